"""Compiled graphs run the kernels of eager calls, as operators of torch."""

import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import profile

from torchlosses import LinearCrossEntropyError, formulas, linear, ops
from torchlosses.formulas import Arguments, Call, Loss
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

KINDS = ("squares", "probabilities", "logits")
LOSSES: dict[str, Any] = {
    "squares": sum_squared_error,
    "probabilities": cross_entropy_error,
    "logits": lambda *args, **options: cross_entropy_error(*args, from_logits=True, **options),
    "linear": lambda input, target, **options: linear_cross_entropy_error(
        input, torch.eye(5).to(input), target, **options
    ),
}

# Both ways of all that graphs hold are in the tests of transforms.
pytestmark = pytest.mark.parametrize("path", ["kernels"], indirect=True)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    ops.kernels_of(torch.device("cpu"), "squares")  # Registers the native operators.
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operators(call: Any, *arguments: Any) -> list[str]:
    """The names of the package's operators in the graph of a call."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(call, fullgraph=True, backend=keep)(*arguments)
    (graph,) = graphs
    names = (str(node.target) for node in graph.graph.nodes)
    return [name for name in names if name.startswith("torchlosses.")]


def batch(is_index: bool) -> tuple[Tensor, Tensor]:
    y = torch.rand(6, 5).softmax(1).requires_grad_()
    return y, torch.randint(5, (6,)) if is_index else torch.rand(6, 5).softmax(1)


@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_holds_an_operator(name: str, is_index: bool, device: str) -> None:
    y, t = (x.to(device) for x in batch(is_index))
    loss = LOSSES[name]
    operator = "linear_loss" if name == "linear" else "loss"
    assert operators(loss, y, t) == [f"torchlosses.{operator}.default"]
    learned = torch.rand(6, device=device, requires_grad=True)
    if name != "squares" or is_index:  # A gradient by weights is the formula's.
        assert operators(lambda *args: loss(*args, sample_weight=learned), y, t) == []
        assert operators(lambda *args: loss(*args, sample_weight=learned.detach()), y, t) != []
    assert operators(torch.func.grad(loss), y, t) == []


def test_a_loss_that_no_kernel_knows_goes_to_the_formula(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, t = (x.to(device) for x in batch(is_index=False))
    call = Call("cubes", False, 1, "sum", -100, torch.float32)

    def cubes(input: Tensor, target: Tensor) -> Tensor:
        arguments = Arguments(input, target)
        return ops.compute(call, arguments, ops.key_of("cubes", call, arguments))

    def formula(call: Call, input: Tensor, target: Any, *_: Any) -> Tensor:
        cubes: Tensor = (input - target) ** 3
        return cubes

    monkeypatch.setitem(formulas.LOSSES, "cubes", Loss("cubes", True, "real", formula))
    expected = ((y - t) ** 3).sum()
    torch.testing.assert_close(cubes(y, t), expected)
    assert operators(cubes, y, t) == []
    (gradient,) = torch.autograd.grad(torch.compile(cubes, backend="aot_eager")(y, t), y)
    torch.testing.assert_close(gradient, 3 * (y - t).detach() ** 2)


@pytest.mark.parametrize("call", [("cubes", "sum"), ("squares", "median")])
def test_a_kernel_knows_its_own_names_alone(
    call: tuple[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, t = (x.detach().to(device) for x in batch(is_index=False))
    kind, reduction = call
    kernels: Any = ops.kernels_of(torch.device(device), "squares")
    unknown = Call(kind, False, 1, reduction, -100, torch.float32)
    monkeypatch.setitem(formulas.LOSSES, "cubes", formulas.LOSSES["squares"])
    with pytest.raises(ValueError, match=r"not in tuple|one of"):
        kernels.prepare(unknown, y, t, None, None)


def packed(kind: str, is_index: bool, reduction: str) -> str:
    return ops.pack(Call(kind, is_index, 1, reduction, -100, torch.float32, 1e-7))


# opcheck looks at gradients of what it cloned.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
def test_the_operators_are_what_they_say(
    kind: str, is_index: bool, is_late: bool, is_weighted: bool, device: str
) -> None:
    y, t = (x.to(device) for x in batch(is_index))
    reduction = "none" if is_late else "mean"
    weights = (None, torch.rand(6, device=device) if is_weighted else None)
    if kind == "linear":
        w = torch.randn(5, 5, device=device).t().requires_grad_()
        b = torch.randn(5, device=device)
        options = packed("logits", is_index, reduction)
        for size, needs in ((6, [True, True, False, False]), (0, [False, True, False, False])):
            x = y[:size].detach().requires_grad_(needs[0])
            sample_weight = None if weights[1] is None else weights[1][:size]
            torch.library.opcheck(
                linear.LOSS_OPERATOR.op,
                (x, w, b, t[:size], None, sample_weight, None, torch.float32, options),
            )
        return
    if kind == "squares" and not is_index and is_weighted:
        weights = (None, torch.rand(6, 1, device=device))
    for wanted in itertools.product([False, True], [False, not is_index]):
        leaves = [
            x.detach().requires_grad_(needed) for x, needed in zip((y, t), wanted, strict=True)
        ]
        torch.library.opcheck(
            ops.LOSS_OPERATOR.op,
            (*leaves, *weights, None, packed(kind, is_index, reduction)),
        )


# ---- The native operators

native = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="of the CPU's kernels")


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_native_operators_where_they_serve(kind: str, path: str) -> None:
    assert ops.kernels_of(torch.device("cpu"), kind).HAS_OPERATORS  # type: ignore[union-attr]

    def names(y: Tensor, t: Tensor, **options: Any) -> list[str]:
        graphs: list[Any] = []

        def keep(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        torch.compiler.reset()
        loss = torch.compile(LOSSES[kind], fullgraph=True, backend=backend)(y, t, **options)
        if loss.requires_grad:
            loss.sum().backward()
        targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        return [name.split(".")[1] for name in targets if name.startswith("torchlosses.")]

    for is_index in (False, True):
        y, t = batch(is_index)
        assert names(y, t) == ["native_loss_and_gradient", "native_loss_gradient"]
        assert names(y, t, reduction="none") == ["native_loss", "native_loss_gradient"]
        assert names(y.detach(), t) == ["native_loss"]
        weights = torch.rand(6) if is_index or kind != "squares" else torch.rand(6, 1)
        assert names(y, t, sample_weight=weights) == ["loss_and_gradients", "loss_gradients"]
    y, t = batch(is_index=False)
    assert names(y, t.requires_grad_()) == ["loss_and_gradients", "loss_gradients"]


CELLS = (  # Shape of the input, class dimension, dtype of class indices.
    ((5,), 0, torch.int64),
    ((600, 6), 1, torch.uint16),
    ((4, 5, 30), 1, torch.int8),
    ((3, 2, 6), 2, torch.int32),
    ((0, 5), 1, torch.int64),
)


@native
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_native_operators_return_the_bits_of_the_others(
    kind: str, is_index: bool, reduction: str, dtype: torch.dtype, path: str
) -> None:
    computed = torch.promote_types(dtype, torch.float32)
    operator = ops.LOSS_OPERATOR
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    for shape, dim, integer in CELLS:
        call = Call(kind, is_index, dim, reduction, 3 if is_index else -100, computed, 0.1, 0.2)
        y, t = torch.rand(shape).to(dtype), torch.rand(shape) < 0.5
        if is_index:  # Some classes are ignored, and some are none.
            t = torch.randint(0, 7, [*shape[:dim], *shape[dim + 1 :]]).to(integer)
        for input in (y, y.transpose(0, -1).contiguous().transpose(0, -1)):
            inputs = (input, t, None, None, None, ops.pack(call))
            assert ops._find_native_inputs(inputs, [True, False]) is not None
            assert ops.unpack(ops.pack(call)) == call
            needs = [not ops.is_deferred(call, dtype), False]
            for factor in (1.0, 0.3, torch.inf):
                loss, *handles = operator.call_loss_and_gradients(*inputs, needs)
                expected, *others = operator.op_loss_and_gradients(*inputs, needs)
                close(loss, expected)
                close(operator.call_loss_and_gradients(*inputs, [False, False])[0], expected)
                rest = [True, False], torch.full_like(loss, factor)
                expected = operator.op_gradients(*inputs, *rest, others)
                close(operator.call_gradients(*inputs, *rest, handles), expected)
                # The handles are empty now.
                close(operator.call_gradients(*inputs, *rest, handles), expected)


@native
def test_native_operators_refuse_what_no_kernel_knows(path: str) -> None:
    y, t = (x.detach() for x in batch(is_index=False))
    text = packed("squares", False, "sum")
    for wrong in (text.replace("squares", "cubes"), text.replace("sum", "median")):
        with pytest.raises(RuntimeError, match="no kernel knows"):
            ops.LOSS_OPERATOR.native_loss(y, t, wrong)
    transposed = torch.rand(64, 64).t()

    def fail() -> None:
        with pytest.raises(RuntimeError, match="of another dtype"):
            ops.LOSS_OPERATOR.native_gradient(transposed, transposed, text, upstream, upstream)

    upstream = torch.ones((), dtype=torch.float64)
    left, _ = allocated(fail)  # A failed call frees its copies.
    assert left < transposed.nbytes
    huge = torch.rand(1, 1).expand(2**22, 2**22)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        ops.LOSS_OPERATOR.native_loss(huge, huge, text)
    with pytest.raises(RuntimeError, match="64 dimensions"):
        ops.LOSS_OPERATOR.native_loss(torch.rand([1] * 65), torch.rand([1] * 65), text)


@native
def test_any_number_of_handles_lives_at_a_time(path: str) -> None:
    y, t = (x.detach() for x in batch(is_index=False))
    text, upstream = packed("squares", False, "sum"), torch.tensor(2.0)
    handles = [ops.LOSS_OPERATOR.native_loss_and_gradient(y, t, text)[1] for _ in range(5000)]
    for handle in handles:
        gradient = ops.LOSS_OPERATOR.native_gradient(y, t, text, upstream, handle)
        assert torch.equal(gradient, (y - t) * 2)


@native
def test_many_threads_call_native_operators(path: str) -> None:
    def run(leaf: Tensor) -> bool:
        for _ in range(300):
            loss, handle = ops.LOSS_OPERATOR.native_loss_and_gradient(leaf, t, text)
            gradient = ops.LOSS_OPERATOR.native_gradient(leaf, t, text, loss.sign(), handle)
            if not torch.equal(gradient, leaf - t):
                return False
        return True

    y, t = (x.detach() for x in batch(is_index=False))
    text = packed("squares", False, "sum")
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, [y + k for k in range(8)]))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("name", ["squares", "probabilities", "logits"])
def test_second_derivatives_are_there_or_refused(name: str, reduction: str, device: str) -> None:
    y, t = (x.to(device) for x in batch(is_index=True))

    def second(loss: Any) -> Tensor:
        total = loss(y, t, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(total, y, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), y)[0]

    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(second(compiled), second(loss))
    with pytest.raises(RuntimeError, match=r"does not currently support|requires create_graph"):
        second(torch.compile(loss, fullgraph=True, backend="aot_eager"))


def test_one_graph_serves_batches_of_any_size(device: str) -> None:
    def losses(y: Tensor, t: Tensor) -> list[Tensor]:
        return [LOSSES[kind](y, t) for kind in KINDS]

    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    y, t = (x.detach().to(device) for x in batch(is_index=True))
    for size in (6, 4, 2, 0):
        leaf, label = y[:size].clone().requires_grad_(), t[:size].clone()
        with torch.compiler.set_stance("fail_on_recompile" if size in (4, 2) else "default"):
            results = compiled(leaf, label)
        expected = losses(leaf, label)
        torch.testing.assert_close(results, expected)
        (gradient,), (right,) = (torch.autograd.grad(sum(r), leaf) for r in (results, expected))  # type: ignore[arg-type]
        torch.testing.assert_close(gradient, right)


def test_reduced_overhead(device: str) -> None:
    layer = LinearCrossEntropyError(5, 5, reduction="mean", device=device)

    def step(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = LOSSES["logits"](x, t, reduction="mean") + layer(x, t)
        return result

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    x, t = (x.to(device) for x in batch(is_index=True))
    for _ in range(3):
        expected = torch.autograd.grad(step(x, t), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x, t), x), expected)


def test_a_gradient_that_is_not_finite_from_upstream_leaves_what_is_ignored(device: str) -> None:
    y, _ = (x.to(device) for x in batch(is_index=True))
    t = torch.tensor([1, -100, 0, 2, 3, 4], device=device)
    for kind in KINDS:
        loss = torch.compile(LOSSES[kind], fullgraph=True, backend="aot_eager")(y, t)
        (gradient,) = torch.autograd.grad(loss, y, torch.full_like(loss, torch.inf))
        assert not gradient[1].any()
        assert not gradient[[0, 2, 3, 4, 5]].isfinite().all()


def test_a_graph_keeps_the_gradient_and_no_more(device: str) -> None:
    y, t = torch.rand(64, 50, device=device, requires_grad=True), torch.randint(50, (64,))
    t = t.to(device)
    for kind, reduction in itertools.product(KINDS, ("sum", "none")):
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.nbytes if x.data_ptr() not in (y.data_ptr(), t.data_ptr()) else 0)
            return x

        compiled = torch.compile(LOSSES[kind], fullgraph=True, backend="aot_eager")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = compiled(y, t, reduction=reduction)
        ignored = t.numel()  # A byte each.
        assert sum(sizes) <= ignored + (y.nbytes if reduction == "sum" else 0)
        torch.autograd.grad(loss.sum(), y)


def test_a_module_with_a_loss_trains(device: str) -> None:
    network = nn.Linear(5, 5, device=device)
    x, t = (x.detach().to(device) for x in batch(is_index=True))

    def step(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = cross_entropy_error(network(x), t, from_logits=True, reduction="mean")
        return result

    compiled = torch.compile(step, fullgraph=True)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(step(x, t), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, t), parameters), expected)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_class_in_a_mean_spoils_its_own_sample(
    kind: str, is_weighted: bool, device: str
) -> None:
    y, _ = (x.to(device) for x in batch(is_index=True))
    t = torch.tensor([1, 7, -100, 2, -1, 0], device=device)
    options: dict[str, Any] = {"reduction": "mean", "sample_weight": torch.rand(6, device=device)}
    if is_weighted and kind != "squares":
        options["weight"] = torch.rand(5, device=device)
    loss = torch.compile(LOSSES[kind], fullgraph=True, backend="aot_eager")(y, t, **options)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, y)
    valid = (t >= 0) & (t < 5)
    assert gradient.isnan().all(1).tolist() == [False, True, False, False, True, False]
    counts = t.where(valid, 0)  # What names no class counts as the first in the divisor.
    scale = options["sample_weight"]
    if "weight" in options:
        scale = scale * options["weight"][counts]
    scale = scale.where(t != -100, 0).sum() * (5 if kind == "squares" else 1)
    options["reduction"] = "sum"
    right = LOSSES[kind](y, t.where(valid, -100), **options) / scale
    (expected,) = torch.autograd.grad(right, y)
    torch.testing.assert_close(gradient[valid], expected[valid])


def allocated(call: Any) -> tuple[int, Any]:
    """The bytes that a call allocates and does not free, and its result."""
    with profile(profile_memory=True) as profiler:
        result = call()
    events = getattr(profiler.profiler, "kineto_results").events()  # noqa: B009
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


@native
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_handle_holds_gradients_until_backward_takes_them(
    name: str, is_weighted: bool, path: str
) -> None:
    """The caller may write to what backward returned."""
    y, t = torch.rand(64, 5, requires_grad=True), torch.randint(5, (64,))
    options = {"sample_weight": torch.rand(64)} if is_weighted else {}
    (expected,) = torch.autograd.grad(LOSSES[name](y, t, **options), y)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    torch.autograd.grad(compiled(y, t, **options), y)
    with torch._functorch.config.patch(donated_buffer=False):
        held, loss = allocated(lambda: compiled(y, t, **options))
        assert held >= y.nbytes
        for is_first in (True, False):
            fresh, (gradient,) = allocated(lambda: torch.autograd.grad(loss, y, retain_graph=True))
            torch.testing.assert_close(gradient, expected)
            assert (fresh < y.nbytes) == is_first
            gradient.zero_()
        left, _ = allocated(lambda: [compiled(y, t, **options)].clear())
    assert left < y.nbytes


@native
@pytest.mark.parametrize("is_native", [False, True])
def test_a_copy_of_a_handle_holds_nothing(is_native: bool, path: str) -> None:
    y, t = batch(is_index=True)
    (expected,) = torch.autograd.grad(3 * LOSSES["logits"](y, t), y)
    weight = None if is_native else torch.ones(5)
    inputs = (y, t, weight, None, None, packed("logits", True, "sum"), [True, False])
    _, handle = ops.LOSS_OPERATOR.call_loss_and_gradients(*inputs)
    upstream, found = torch.tensor(3.0), []
    for held in (handle.clone(), handle, handle):
        fresh, (gradient,) = allocated(
            lambda held=held: ops.LOSS_OPERATOR.call_gradients(*inputs, upstream, [held])
        )
        torch.testing.assert_close(gradient, expected)
        found.append(fresh >= y.nbytes)
    assert found == [True, False, True]


def test_a_layer_prepared_anew_between_forward_and_backward(path: str) -> None:
    y, t = batch(is_index=True)
    compiled = torch.compile(LOSSES["linear"], fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(3 * LOSSES["linear"](y, t), y)
    loss = compiled(y, t)
    ops._prepared.clear()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, y)[0], expected)


@native
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("name", ["weight", "sample_weight", "upstream"])
def test_copies_outlive_a_kernel_that_dynamo_calls(name: str, path: str) -> None:
    """Dynamo compiles `Plan.compute` by itself where it fails to trace the caller."""
    y, t = torch.rand(64, 64), torch.randint(64, (64,))
    copied = {name: torch.rand(64, dtype=torch.float64)}  # To float32.
    call = Call("logits", True, 1, "none", -100, torch.float32)
    kernels = ops.kernels_of(y.device, call.kind)
    assert kernels is not None
    plan = kernels.prepare(call, y, t, copied.get("weight"), copied.get("sample_weight"))

    def compute() -> Any:
        weights = copied.get("weight"), copied.get("sample_weight")
        return plan.compute(y, t, *weights, (True, False), copied.get("upstream"))

    expected = compute()
    compiled = torch.compile(compute, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled()[:2], expected[:2])
