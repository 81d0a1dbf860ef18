"""Losses under `torch.func`, `torch.compile` and tracers agree with eager losses."""

import functools
import itertools
import re
from typing import Any

import pytest
import torch
from samples import SAMPLES, Sample
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from torchlosses import CrossEntropyError, LinearCrossEntropyError, SumSquaredError, functional
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

# Every loss and kind of target, without options and with all of them.
FORMS = [
    sample
    for sample in SAMPLES
    if sample.name.startswith(("sse-dense-sample_weight(4, 1)", "sse-index-(4, 5)-dim=None"))
    or ("-(4, 5)-dim=None-all" in sample.name or "-(4, 5)-dim=None-plain" in sample.name)
]
HARD = [sample for sample in SAMPLES if "corners" in sample.name or "hard-logits" in sample.name]


def call(sample: Sample, device: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    input, target, options = sample.tensors(dtype, device)
    return lambda y: sample.function(y, target, **options), input


def close(actual: Any, expected: Any, **options: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True, **options)


def by_autograd(loss: Any, input: Tensor) -> Tensor:
    leaf = input.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("sample", FORMS + HARD, ids=lambda sample: sample.name)
def test_first_derivatives(sample: Sample, device: str) -> None:
    loss, input = call(sample, device)
    expected = by_autograd(loss, input)
    close(grad(lambda y: loss(y).sum())(input), expected)
    forward = jvp(loss, (input,), (torch.ones_like(input),))
    value, tangent = forward[0], forward[1]
    close(value, loss(input))
    is_finite = expected.isfinite().all()
    if is_finite:  # Elsewhere a tangent may contain 0·∞ = NaN, which the gradient does not.
        close(tangent.sum(), expected.sum())
        close(jacfwd(lambda y: loss(y).sum())(input), expected)
    close(jacrev(lambda y: loss(y).sum())(input), expected)


@pytest.mark.parametrize("sample", FORMS, ids=lambda sample: sample.name)
def test_hessian(sample: Sample, device: str) -> None:
    loss, input = call(sample, device)
    expected = torch.autograd.functional.hessian(lambda y: loss(y).sum(), input)
    close(hessian(lambda y: loss(y).sum())(input), expected)
    close(jacrev(jacrev(lambda y: loss(y).sum()))(input), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("form", ["sse", "probabilities", "logits"])
@pytest.mark.parametrize("is_index", [False, True])
def test_vmap_equals_a_loop(form: str, is_index: bool, reduction: Any, device: str) -> None:
    criterion: nn.Module = SumSquaredError(reduction=reduction)
    if form != "sse":
        criterion = CrossEntropyError(reduction=reduction, from_logits=form == "logits")
    y = torch.rand(3, 4, 5, dtype=torch.float64, device=device)
    t = torch.rand(3, 4, 5, dtype=torch.float64, device=device).softmax(-1)
    if is_index:
        t = torch.randint(5, (3, 4), device=device)
        t[1, 2] = -100
    close(vmap(criterion)(y, t), torch.stack([criterion(*pair) for pair in zip(y, t, strict=True)]))
    close(vmap(criterion, (0, None))(y, t[1]), torch.stack([criterion(row, t[1]) for row in y]))

    def total(y: Tensor, t: Tensor) -> Any:
        return criterion(y, t).sum()

    per_sample = vmap(grad(total))(y, t)
    expected = [by_autograd(lambda row, i=i: total(row, t[i]), y[i]) for i in range(3)]
    close(per_sample, torch.stack(expected))


@pytest.mark.parametrize("from_logits", [False, True])
def test_vmap_over_samples_with_class_weights(from_logits: bool, device: str) -> None:
    weight = torch.rand(5, dtype=torch.float64, device=device)
    criterion = CrossEntropyError(weight=weight, from_logits=from_logits, reduction="mean")
    y = torch.rand(3, 5, dtype=torch.float64, device=device)
    t = torch.tensor([0, 4, -100], device=device)
    expected = [by_autograd(lambda row, i=i: criterion(row, t[i]), y[i]) for i in range(3)]
    close(vmap(grad(criterion))(y, t), torch.stack(expected))


def test_vmap_over_a_bad_class_is_nan(device: str) -> None:
    y = torch.rand(3, 4, device=device)
    t = torch.tensor([0, 4, 1], device=device)
    for criterion in (CrossEntropyError(), CrossEntropyError(from_logits=True), SumSquaredError()):
        assert vmap(criterion)(y, t).isnan().tolist() == [False, True, False]
        by_row = vmap(grad(criterion))(y, t).isnan()
        assert by_row.all(1).tolist() == by_row.any(1).tolist() == [False, True, False]


# Graphs do not depend on the path; the eager calls that they are compared with run the kernels.
once = pytest.mark.parametrize("path", ["kernels"], indirect=True)
# Inductor takes ten seconds for some losses with all options, so it compiles each loss once with
# all options, and losses of class indices without options. "aot_eager" compiles the other losses
# without options, and those without a guard; "eager" traces the rest. For the samples with special
# values, reductions that hide differences are left out.
INDUCTOR = re.compile(
    "sse-dense.*-mean|sse-index.*-none-ignored|ce-probabilities-soft.*-all-mean|"
    "ce-probabilities-index.*-(all-none|plain-none)|ce-logits-soft.*-all-none|"
    "ce-logits-index.*-(all-mean|plain-mean)"
)
AOT_EAGER = re.compile("sse-index.*=None-(mean|none)$|ce-.*-plain-(mean|none)$|ce-.*-delta=0-")
TRACED = FORMS + [s for s in HARD if not s.name.endswith(("-sum", "-batchmean"))]


def backend_of(sample: Sample) -> str:
    if INDUCTOR.match(sample.name):
        return "inductor"
    return "aot_eager" if AOT_EAGER.match(sample.name) else "eager"


def can_repeat(sample: Sample) -> bool:
    """Whether input and target may be repeated along dimension 0 with the same options."""
    return sample.options.get("dim") in (None, -1) and "sample_weight" not in sample.options


GRAPHS = [  # One graph of four losses compiles faster than four graphs.
    (backend, samples[start : start + 4])
    for backend in ("inductor", "aot_eager", "eager")
    for repeats in (True, False)
    for samples in [[s for s in TRACED if (backend_of(s), can_repeat(s)) == (backend, repeats)]]
    for start in range(0, len(samples), 4)
]


@once
@pytest.mark.parametrize(("backend", "samples"), GRAPHS)
def test_compile(backend: str, samples: list[Sample], device: str) -> None:
    def losses(calls: list[Any]) -> list[Tensor]:
        return [
            sample.function(input, target, **options)
            for sample, (input, target, options) in zip(samples, calls, strict=True)
        ]

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=backend)
    calls: list[Any] = [sample.tensors(torch.float64, device) for sample in samples]
    for stance in ("default", "fail_on_recompile"):
        eager_calls, compiled_calls = (
            [(input.clone().requires_grad_(), *rest) for input, *rest in calls] for _ in range(2)
        )
        with torch.compiler.set_stance(stance):
            results = compiled(compiled_calls)
        expected = losses(eager_calls)
        torch.stack([loss.sum() for loss in expected]).sum().backward()
        torch.stack([loss.sum() for loss in results]).sum().backward()
        for sample, *pair, ours, theirs in zip(
            samples, results, expected, compiled_calls, eager_calls, strict=True
        ):
            for actual, number in (pair, (ours[0].grad, theirs[0].grad)):
                close(actual, number, msg=lambda text, name=sample.name: f"{name}: {text}")
        if can_repeat(samples[0]):  # A larger batch must not recompile.
            calls = [
                (torch.cat((input, input)), torch.cat((target, target)), options)
                for input, target, options in calls
            ]


DELTAS = (1e-7, 1e-6, 1e-4, 1e-2, 0.5, 1.0, 3.0, 1e-9, 1e-20, 1e-30)
SMOOTHINGS = (0.1, 0.2, 0.3, 0.01, 1e-3, 1e-5, 1e-7, 1e-9, 0.7, 0.999)


def count_graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


@once
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_graphs_serve_every_delta_and_smoothing(backend: str, device: str) -> None:
    """One graph for the first pair, one for all others; 0, 1 and δ outside float32 add graphs."""
    is_slow = backend == "inductor"
    x, w = torch.randn(6, 5, device=device), torch.randn(5, 5, device=device)
    soft = torch.randn(6, 5, device=device).softmax(1)
    label = torch.tensor([1, 4, -100, 0, 2, 2], device=device)

    def losses(x: Tensor, delta: float, smoothing: float) -> list[Tensor]:
        options: Any = {"delta": delta, "label_smoothing": smoothing}
        options["reduction"] = "mean" if is_slow else "none"
        return [
            loss
            for t in ((label,) if is_slow else (label, soft))
            for loss in (
                cross_entropy_error(x.softmax(1), t, **options),
                cross_entropy_error(x, t, from_logits=True, **options),
                linear_cross_entropy_error(x, w, t, **options),
            )
        ]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    sweep = list(zip(DELTAS, SMOOTHINGS, strict=True))
    others = [] if is_slow else [(0.0, 0.0), (1e-40, 1.0)]
    for delta, smoothing in sweep + others:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [
            f(leaf, delta, smoothing) for f, leaf in zip((compiled, losses), leaves, strict=True)
        ]
        for pair in zip(*results, strict=True):
            torch.testing.assert_close(*pair)
            gradients = (
                torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
                for loss, leaf in zip(pair, leaves, strict=True)
            )
            torch.testing.assert_close(*gradients)
        assert count_graphs() <= (2 if (delta, smoothing) in sweep else 4)


@once
def test_a_graph_of_any_delta_is_followed_by_one_of_0(device: str) -> None:
    """The compiler fixes the value of a symbol that is 0, and still holds the symbol."""
    torch._dynamo.reset()
    y, t = torch.rand(4, 5, device=device), torch.arange(4, device=device)
    compiled: Any = torch.compile(cross_entropy_error, fullgraph=True, backend="eager")
    for delta in (0.5, 0.25, 0.0):
        expected = cross_entropy_error(y, t, delta=delta)
        torch.testing.assert_close(compiled(y, t, delta=delta), expected)


@once
def test_a_schedule_and_a_search_compile_twice(device: str) -> None:
    x = torch.randn(6, 5, device=device).softmax(1)
    label = torch.tensor([1, 4, -100, 0, 2, 2], device=device)
    forms: list[Any] = [
        CrossEntropyError,
        functools.partial(CrossEntropyError, from_logits=True),
        functools.partial(LinearCrossEntropyError, 5, 5, device=device),
    ]
    for form, is_search in itertools.product(forms, (False, True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        criterion = form()
        compiled: Any = torch.compile(criterion, fullgraph=True, backend="eager")
        for delta, smoothing in list(zip(DELTAS, SMOOTHINGS, strict=True))[:4]:
            if is_search:
                criterion = form(delta=delta, label_smoothing=smoothing)
                compiled = torch.compile(criterion, fullgraph=True, backend="eager")
            criterion.delta, criterion.label_smoothing = delta, smoothing
            torch.testing.assert_close(compiled(x, label), criterion(x, label))
        assert count_graphs() == 2


@once
def test_compiled_bad_class_is_nan(device: str) -> None:
    torch._dynamo.reset()
    target = torch.tensor([0, 7, -100, 1], device=device)
    for criterion in (
        SumSquaredError(reduction="none"),
        CrossEntropyError(reduction="none"),
        CrossEntropyError(reduction="none", from_logits=True),
    ):
        y = torch.rand(4, 3, device=device, requires_grad=True)
        loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(y, target)
        assert loss.reshape(4, -1).isnan().all(1).tolist() == [False, True, False, False]
        loss.nansum().backward()
        loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(y, target)
        y.grad = None
        loss.sum().backward()
        assert y.grad is not None
        assert y.grad.isnan().all(1).tolist() == [False, True, False, False]
        assert y.grad[2].count_nonzero() == 0


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    y, t = torch.rand(4, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert cross_entropy_error(y, t, reduction="none").shape == (4,)
    with FakeTensorMode():
        y, t = torch.rand(4, 5), torch.zeros(4, dtype=torch.int64)
        assert cross_entropy_error(y, t, reduction="none").shape == (4,)


def test_functional_call_replaces_the_class_weights() -> None:
    criterion = CrossEntropyError(weight=torch.ones(5))
    y, t = torch.rand(4, 5), torch.tensor([0, 1, 2, 3])
    weights = {"weight": torch.full((5,), 2.0)}
    assert functional_call(criterion, weights, (y, t)) == 2 * criterion(y, t)


MASKED = [
    criterion
    for reduction in ("sum", "mean", "batchmean", "none")
    for criterion in (
        SumSquaredError(reduction=reduction),
        CrossEntropyError(reduction=reduction),
        CrossEntropyError(reduction=reduction, from_logits=True, label_smoothing=0.1),
        CrossEntropyError(reduction=reduction, from_logits=True, weight=torch.rand(5)),
    )
]


@pytest.mark.parametrize("is_index", [False, True])
def test_batch_size_that_depends_on_data(is_index: bool) -> None:
    """Compiled and exported graphs with unbacked sizes, which may be 0.

    With the reductions that divide by the batch size, and with unreduced losses.
    """
    criteria = [*MASKED[4:12], MASKED[-4], MASKED[-2]]
    y = torch.rand(6, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, False])
    t = torch.tensor([1, -100, 3, 0, 0, 2]) if is_index else torch.rand_like(y).softmax(1)
    w = torch.rand_like(y)

    class Masked(nn.Module):
        def forward(self, y: Tensor, t: Tensor, w: Tensor, mask: Tensor) -> list[Tensor]:
            y, t, w = y[mask], t[mask], w[mask]
            losses = []
            for number, criterion in enumerate(criteria):
                weight = (
                    w if t.shape == y.shape and isinstance(criterion, SumSquaredError) else w[:, 0]
                )
                # Two of the four losses of each reduction are weighted, in turn.
                is_weighted = (number + number // 4) % 2 == 1
                losses.append(criterion(y, t, sample_weight=weight if is_weighted else None))
            return losses

    masked = Masked()
    torch._dynamo.reset()
    graphs: list[Any] = [torch.export.export(masked, (y, t, w, mask)).module()]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graphs.append(torch.compile(masked, fullgraph=True, backend="aot_eager"))
        for part in (mask, ~mask, torch.zeros_like(mask)):
            leaf = y.clone().requires_grad_()
            for graph in graphs:
                losses = graph(leaf, t, w, part), masked(leaf, t, w, part)
                close(*losses)
                sums = (sum(x.sum() * (k + 1) for k, x in enumerate(result)) for result in losses)
                close(*(torch.autograd.grad(x, leaf) for x in sums))


@pytest.mark.parametrize(
    ("criterion", "mode"),
    [(criterion, "symbolic") for criterion in MASKED]
    + [(criterion, mode) for criterion in MASKED[4:8] for mode in ("real", "fake")],
    ids=str,
)
def test_make_fx(criterion: nn.Module, mode: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    y = torch.rand(6, 5, dtype=torch.float64)
    soft = torch.rand_like(y).softmax(1)
    weights = dict(criterion.named_buffers())

    def loss(weights: dict[str, Tensor], y: Tensor, t: Tensor) -> Any:
        return functional_call(criterion, weights, (y, t))

    for t in (torch.tensor([1, -100, 3, 0, 0, 2]), soft):
        graph = make_fx(loss, tracing_mode=mode)(weights, y, t)
        close(graph(weights, y.flip(0), t), criterion(y.flip(0), t))


def test_fake_tensors_with_symbolic_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for criterion in MASKED:
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            y, t = torch.rand(4, 5), torch.zeros(4, dtype=torch.int64)
            weights: dict[str, Any] = {
                name: mode.from_tensor(w) for name, w in criterion.named_buffers()
            }
            loss = functional_call(criterion, weights, (y, t))
        assert loss.dtype == torch.float32


def test_symbolic_trace() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)
            self.criterion = CrossEntropyError(from_logits=True, weight=torch.rand(5))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            y = self.linear(x)
            loss: Tensor = self.criterion(y, t) + functional.sum_squared_error(y, t)
            return loss

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    x, t = torch.rand(4, 5), torch.tensor([0, 1, 2, 3])
    close(traced(x, t), model(x, t))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert cross_entropy_error in targets
    assert sum_squared_error in targets
