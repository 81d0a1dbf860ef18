"""First and second derivatives, in forward and reverse mode, by every differentiable argument."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import SAMPLES, Sample
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torchlosses import CrossEntropyError, SumSquaredError
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

# Small samples where the loss is smooth: finite differences fail at 0, ∞ and NaN.
SMOOTH = [
    sample
    for sample in SAMPLES
    if 0 < sample.input.size <= 24
    and abs(sample.input).max() < 10
    and not any(word in sample.name for word in ("corners", "nan"))
    and sample.target.dtype.kind in "if"
]
# The formula's second derivatives are those of plain autograd, unless a kernel made the first.
once = pytest.mark.parametrize("path", ["kernels"], indirect=True)
REPRESENTATIVE = [sample for sample in SMOOTH if sample.name.endswith(("-none", "-mean"))]


def differentiable(sample: Sample, device: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The loss as a function of its floating-point arguments, and those arguments."""
    input, target, options = sample.tensors(torch.float64, device)
    named: dict[str, Any] = {"input": input, "target": target} | options
    floating = {
        name: value.requires_grad_()
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    rest = {name: value for name, value in named.items() if name not in floating}

    def loss(*values: Tensor) -> Tensor:
        return sample.function(**dict(zip(floating, values, strict=True)), **rest)

    return loss, tuple(floating.values())


@pytest.mark.parametrize("sample", SMOOTH, ids=lambda sample: sample.name)
def test_gradcheck(sample: Sample, device: str) -> None:
    loss, arguments = differentiable(sample, device)
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(loss, arguments, fast_mode=True, **options)


@once
@pytest.mark.parametrize("sample", REPRESENTATIVE, ids=lambda sample: sample.name)
def test_gradgradcheck(sample: Sample, device: str) -> None:
    loss, arguments = differentiable(sample, device)
    assert gradgradcheck(loss, arguments, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_any_upstream_gradient_any_number_of_times(sample: Sample, device: str) -> None:
    """Backward may run repeatedly, with any upstream gradient (the reference has only ones)."""
    input, target, options = sample.tensors(torch.float64, device)
    input.requires_grad_()
    loss = sample.function(input, target, **options)
    (once,) = torch.autograd.grad(loss.sum(), input, retain_graph=True)
    upstream = torch.randn_like(loss)
    scaled = [torch.autograd.grad(loss, input, upstream, retain_graph=True)[0] for _ in range(3)]
    if loss.dim() < input.dim() and loss.dim() > 0:
        upstream = upstream.unsqueeze(sample.axis)
    for grad in scaled:
        torch.testing.assert_close(grad, once * upstream, rtol=1e-12, atol=1e-16, equal_nan=True)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_documented_gradients(reduction: Any, device: str) -> None:
    y = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)

    def grads(criterion: torch.nn.Module, divisor: int) -> list[Tensor]:
        loss = criterion(y, t).sum()
        return [grad * divisor for grad in torch.autograd.grad(loss, (y, t))]

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-14)

    is_mean = reduction == "mean"
    by_y, by_t = grads(SumSquaredError(reduction=reduction), 20 if is_mean else 1)
    close(by_y, y - t)
    close(by_t, t - y)
    by_y, by_t = grads(CrossEntropyError(reduction=reduction, delta=0.1), 4 if is_mean else 1)
    close(by_y, -t / (y + 0.1))
    close(by_t, -(y + 0.1).log())
    with torch.no_grad():
        t[:, 2] = 0  # The gradient by a target of 0 is not 0.
    by_y, by_t = grads(CrossEntropyError(reduction=reduction, delta=0), 4 if is_mean else 1)
    close(by_y, -t / y)
    close(by_t, -y.log())
    criterion = CrossEntropyError(reduction=reduction, delta=0.1, from_logits=True)
    by_y, by_t = grads(criterion, 4 if is_mean else 1)
    p = y.softmax(1)
    close(by_y, p * ((t * p / (p + 0.1)).sum(1, keepdim=True) - t / (p + 0.1)))
    close(by_t, -(p + 0.1).log())


def test_a_confidently_wrong_sample_has_no_gradient_unless_delta_is_zero(device: str) -> None:
    x = torch.tensor([[50.0, 0.0]], device=device, requires_grad=True)
    target = torch.tensor([1], device=device)
    (guarded,) = torch.autograd.grad(CrossEntropyError(from_logits=True)(x, target), x)
    assert guarded.abs().max() < 1e-13
    exact = CrossEntropyError(from_logits=True, delta=0)
    assert torch.autograd.grad(exact(x, target), x)[0].tolist() == [[1, -1]]


def test_gradient_of_the_guard_is_at_most_its_inverse(device: str) -> None:
    y = torch.zeros(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(CrossEntropyError()(y, torch.tensor([1], device=device)), y)
    assert grad.tolist() == [[0, pytest.approx(-1e7, rel=1e-14), 0]]


CRITERIA = [SumSquaredError(), CrossEntropyError(), CrossEntropyError(from_logits=True)]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(
    criterion: torch.nn.Module, is_index: bool, use_reentrant: bool, device: str
) -> None:
    y = torch.rand(4, 5, device=device, requires_grad=True)
    t = torch.tensor([0, 1, 2, 3], device=device) if is_index else torch.rand(4, 5, device=device)
    expected = criterion(y, t)
    loss = checkpoint(criterion, y, t, use_reentrant=use_reentrant)
    assert loss.item() == expected.item()
    assert torch.equal(_backward(loss, y), _backward(expected, y))


def _backward(loss: Tensor, leaf: Tensor) -> Tensor:
    leaf.grad = None
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_gradient_penalty(criterion: torch.nn.Module, device: str) -> None:
    """The gradient of a squared gradient; for squared errors the Hessian is the identity."""
    y = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(criterion(y, t), y, create_graph=True)
    (penalty,) = torch.autograd.grad(grad.square().sum() / 2, y)
    hessian = torch.autograd.functional.hessian(lambda y: criterion(y, t), y)
    expected = torch.einsum("abcd,ab->cd", hessian, grad)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
    if isinstance(criterion, SumSquaredError):
        torch.testing.assert_close(penalty, y - t)


FORMS: list[tuple[Any, dict[str, Any]]] = [
    (sum_squared_error, {}),
    (cross_entropy_error, {}),
    (cross_entropy_error, {"from_logits": True}),
]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_under_fake_tensors(reduction: Any) -> None:
    y = torch.rand(4, 5, requires_grad=True)
    value = sum_squared_error(y, y.detach(), reduction=reduction)
    upstream = torch.ones_like(value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (grad,) = torch.autograd.grad(value, y, upstream)
    assert isinstance(grad, FakeTensor)
    assert grad.shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_upstream_gradient_may_be_a_negative_view(
    reduction: Any, dtype: torch.dtype, device: str
) -> None:
    """The imaginary part of a conjugate is one: its memory holds the opposite numbers."""
    t = torch.tensor([3], device=device)
    for loss, options in FORMS:
        y = torch.rand(1, 5, device=device).to(dtype).requires_grad_()
        value = loss(y, t, reduction=reduction, **options)
        ones = torch.ones_like(value)
        negative = torch.complex(ones, ones).conj().imag
        assert negative.is_neg()
        (expected,) = torch.autograd.grad(value, y, -ones, retain_graph=True)
        assert torch.equal(torch.autograd.grad(value, y, negative)[0], expected)


def linear(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    layer = torch.eye(5, dtype=input.dtype, device=input.device)
    return linear_cross_entropy_error(input, layer, target, **options)


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_ignored_samples_have_no_gradient_for_any_upstream_gradient(
    reduction: Any, dtype: torch.dtype, upstream: float, device: str
) -> None:
    rows = torch.rand(4, 5, device=device).softmax(1).to(dtype)
    index = torch.tensor([1, -100, 2, -100], device=device)
    for loss, options in (*FORMS, (linear, {}), (cross_entropy_error, {"label_smoothing": 0.1})):
        for shape in ((4, 5), (1, 5, 4), (5,)):
            if loss is linear and len(shape) == 3:
                continue
            target = index[1] if shape == (5,) else index.view(shape[0], *shape[2:])
            y = (rows[1] if shape == (5,) else rows.T[None] if len(shape) == 3 else rows).clone()
            y = y.contiguous().requires_grad_()
            value = loss(y, target, reduction=reduction, **options)
            (grad,) = torch.autograd.grad(value, y, torch.full_like(value, upstream))
            is_finite = grad.isfinite().all(0 if shape == (5,) else 1)
            assert torch.equal(is_finite, target == -100)
            grad = grad.movedim(1, -1) if len(shape) == 3 else grad
            assert not grad[is_finite].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_by_tiny_weights(dtype: torch.dtype, device: str) -> None:
    """1/Σw overflows where w/Σw does not. Scaling all weights changes neither mean nor gradient."""
    y = torch.rand(4, 5, dtype=dtype, device=device).softmax(1).requires_grad_()
    index, soft = torch.tensor([1, -100, 2, 0], device=device), y.detach().roll(1, 0)
    per_sample = torch.tensor([1.0, 2, 3, 1], dtype=dtype, device=device)
    per_element = torch.arange(20, dtype=dtype, device=device).view(4, 5)
    scale = 2.0 ** (-1060 if dtype == torch.float64 else -140)
    smooth = {"label_smoothing": 0.1, "from_logits": True}
    for loss, options in (*FORMS, (linear, {}), (cross_entropy_error, smooth)):
        for target in (index, soft):
            is_elementwise = loss is sum_squared_error and target is soft
            for weight in (per_sample[:, None], per_element) if is_elementwise else (per_sample,):
                results = []
                for w in (weight, weight * scale):
                    value = loss(y, target, reduction="mean", sample_weight=w, **options)
                    results.append((value, *torch.autograd.grad(value, y)))
                torch.testing.assert_close(*results)
                with torch.no_grad():
                    value = loss(y, target, reduction="mean", sample_weight=w, **options)
                # A GPU sums the products with subnormal weights, which have few bits.
                torch.testing.assert_close(value, results[0][0].detach(), rtol=0.1, atol=0)


@pytest.mark.parametrize("is_late", [False, True], ids=["default", "late"])
@pytest.mark.parametrize("is_index", [False, True])
def test_backward_does_not_write_to_tensors_that_a_hook_has(
    is_index: bool, is_late: bool, device: str
) -> None:
    y = torch.rand(4, 5, device=device).requires_grad_()
    target = torch.tensor([1, 0, 2, 4], device=device) if is_index else torch.rand_like(y).detach()
    packed: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append((tensor.detach(), tensor.detach().clone()))
        return tensor

    for loss, options in (*FORMS, (linear, {})):
        packed.clear()
        value = loss(y, target, **options)
        (expected,) = torch.autograd.grad(value, y, torch.full_like(value, 3))
        if is_late:
            value = loss(y, target, **options)
            for saved in getattr(value.grad_fn, "_raw_saved_tensors", ()):
                if saved.data is not None:
                    saved.register_hooks(pack, lambda tensor: tensor)
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss(y, target, **options)
        (grad,) = torch.autograd.grad(value, y, torch.full_like(value, 3))
        torch.testing.assert_close(grad, expected)
        grad.fill_(7)  # The gradient belongs to the caller.
        assert packed or is_late
        assert all(torch.equal(tensor, before) for tensor, before in packed)


def test_upstream_gradient_may_be_a_zero_tensor_without_storage(device: str) -> None:
    y = torch.rand(2, 5, device=device, requires_grad=True)
    for loss, options in FORMS:
        value = loss(y, torch.tensor([3, 0], device=device), **options)
        # Private: autograd makes such tensors, but no public function does.
        zero = torch._efficientzerotensor((), device=device)
        assert torch.autograd.grad(value, y, zero)[0].count_nonzero() == 0


def test_gradient_by_a_target_of_0_at_a_logit_of_minus_infinity_is_0(device: str) -> None:
    """0·log 0 is 0, and so is its derivative by the target."""
    x = torch.tensor([[-torch.inf, 0.0, 1.0, 2.0]], device=device)
    t = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device, requires_grad=True)
    loss = cross_entropy_error(x, t, from_logits=True, delta=0)
    expected = -x.log_softmax(1).where(x.isfinite(), 0)
    torch.testing.assert_close(torch.autograd.grad(loss, t)[0], expected)


def test_gradient_that_overflows_before_its_division_by_the_count(device: str) -> None:
    y = torch.full((1000, 2), 0.5, device=device)
    y[0, 0] = 1e-39
    t = torch.full_like(y, 0.5)
    y.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy_error(y, t, delta=0, reduction="mean"), y)
    torch.testing.assert_close(grad, (-0.5 / y.double() / 1000).float().detach())


def test_learned_weights_have_gradients(device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(5, device=device))
    criterion = CrossEntropyError(weight=weight, reduction="mean")
    assert list(criterion.parameters()) == [weight]
    y = torch.rand(4, 5, device=device)
    sample_weight = torch.ones(4, device=device, requires_grad=True)
    loss = criterion(y, torch.tensor([0, 1, 2, 2], device=device), sample_weight=sample_weight)
    by_class, by_sample = torch.autograd.grad(loss, (weight, sample_weight))
    # ∂(Σ wₖ Eₖ / Σ wₖ)/∂wᵢ = (Eᵢ − mean) / 4 for weights of 1.
    losses = -(y[range(4), [0, 1, 2, 2]] + 1e-7).log()
    torch.testing.assert_close(by_sample, (losses - losses.mean()) / 4)
    assert by_class[3:].tolist() == [0, 0]
    torch.testing.assert_close(by_class[2], by_sample[2:].sum())


# The target as a function of the input.
DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda y: y * y,
    "flip": lambda y: y.flip(0),
    "same": lambda y: y,
    "sigmoid": torch.sigmoid,
}


def by_torch(criterion: torch.nn.Module, y: Tensor, t: Tensor) -> Tensor:
    """The criterion's loss in torch operations."""
    if isinstance(criterion, SumSquaredError):
        return (y - t).square().sum() / 2
    p = y.softmax(1) if criterion.from_logits else y
    return -(t * (p + 1e-7).log()).sum()


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("target_of", DEPENDENT.values(), ids=DEPENDENT)
def test_target_computed_from_the_input(
    criterion: torch.nn.Module, target_of: Callable[[Tensor], Tensor], device: str
) -> None:
    x = torch.rand(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for loss in (criterion, lambda y, t: by_torch(criterion, y, t)):
        y = 0.9 * x + 0.05  # Not a leaf.
        value = loss(y, target_of(y)) * 3
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
        (first,) = torch.autograd.grad(value, x)
        hessian = torch.autograd.functional.hessian(lambda y, loss=loss: loss(y, target_of(y)), x)
        results.append((value, grad, first, second, hessian))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_tensor_hooks_run_once_with_the_gradient(
    criterion: torch.nn.Module, create_graph: bool, device: str
) -> None:
    x = torch.rand(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    hooked: list[Tensor] = []
    results = []
    for loss in (criterion, lambda y, t: by_torch(criterion, y, t)):
        hooked.clear()
        y = x * 0.9
        t = y.detach().requires_grad_()
        y.retain_grad()
        y.register_hook(hooked.append)
        t.register_hook(hooked.append)
        (grad,) = torch.autograd.grad(loss(y, t), x, None, True, create_graph)
        assert len(hooked) == 1
        loss(y, t).backward(create_graph=create_graph, inputs=[x, y, t])
        assert len(hooked) == 3
        assert y.grad is not None
        results.append((grad, y.grad, t.grad, *hooked))
        x.grad = None
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_index", [False, True])
def test_derivatives_under_a_tiny_guard(dtype: torch.dtype, is_index: bool, device: str) -> None:
    """Gradient and Hessian from logits, where (p + δ)² underflows."""
    t = torch.tensor([1] if is_index else [[0.25, 0.75, 0.0]], device=device)
    t = t if is_index else t.to(dtype)
    deltas = [1e-7, 1e-18, 1e-30, 1e-37, 1e-40, 1e-44]
    if dtype == torch.float64:
        deltas += [1e-160, 1e-300]
    for delta in deltas:
        for gap in (0.0, 10.0, 50.0, 80.0, 200.0, 800.0):
            x = torch.tensor([[0.0, -gap, -1.0]], dtype=dtype, device=device, requires_grad=True)
            loss = CrossEntropyError(delta=delta, from_logits=True)(x, t)
            p = torch.tensor([0.0, -gap, -1.0], dtype=torch.float64).softmax(0)
            soft = torch.tensor([0.0, 1, 0]) if is_index else t[0].double().cpu()
            value = -(soft * torch.logaddexp(p.log(), p.new_tensor(math.log(delta)))).sum()
            gated = soft * p / (p + delta)
            expected = p * gated.sum() - gated
            torch.testing.assert_close(loss.cpu().double(), value, rtol=1e-5, atol=1e-6)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            torch.testing.assert_close(grad[0].cpu().double(), expected, rtol=1e-5, atol=1e-6)
            # ∂²E/∂xᵢ∂xⱼ: (diag p − p pᵀ)·S − gᵢ(δᵢⱼ − pⱼ)·δ/(pᵢ+δ) + pᵢ·Σ gₖ(δₖⱼ − pⱼ)·δ/(pₖ+δ).
            rest = gated * delta / (p + delta)
            by_x = rest.diag() - torch.outer(rest, p)
            hessian = (p.diag() - torch.outer(p, p)) * gated.sum() - by_x
            hessian = hessian + torch.outer(p, by_x.sum(0))
            rows = [torch.autograd.grad(g, x, retain_graph=True)[0][0] for g in grad[0]]
            torch.testing.assert_close(
                torch.stack(rows).cpu().double(), hessian, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("delta", [1e-45, 1e-40, 1e39, 1e300])
def test_a_delta_outside_the_range_of_float32(delta: float, from_logits: bool, device: str) -> None:
    x = torch.tensor([[0.0, 0.5, -2.0]], device=device)
    y = x.softmax(1) if from_logits else x.clamp(min=0)
    x = x if from_logits else y
    x.requires_grad_()
    loss = CrossEntropyError(delta=delta, from_logits=from_logits)(x, y.detach())
    exact = x.detach().double().requires_grad_()
    p = exact.softmax(1) if from_logits else exact
    expected = -(y.double().detach() * (p + delta).log()).sum()
    torch.testing.assert_close(loss, expected.float())
    (grad,), (expected_grad,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(grad, expected_grad.float())


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["sse", "probabilities", "logits"])
@pytest.mark.parametrize("is_index", [False, True])
def test_argument_that_changes_before_backward_is_an_error_or_has_no_effect(
    reduction: Any, dtype: torch.dtype, form: str, is_index: bool, device: str
) -> None:
    """For each argument, and for first, repeated and differentiable backward passes."""
    options: dict[str, Any] = {"reduction": reduction}
    loss: Callable[..., Tensor] = sum_squared_error
    if form != "sse":
        loss, options["from_logits"] = cross_entropy_error, form == "logits"
    for name in ("input", "target", "weight", "sample_weight"):
        if name == "weight" and form == "sse":
            continue
        for use in ("once", "again", "create_graph"):
            # The input is a copy of the leaf, since autograd refuses in-place changes of leaves.
            leaf = torch.rand(4, 5, device=device).to(dtype).requires_grad_()
            target = torch.arange(4, device=device) if is_index else torch.rand_like(leaf).detach()
            named = {"input": leaf * 1, "target": target}
            shape = (4, 1) if form == "sse" and not is_index else (4,)
            named["sample_weight"] = torch.rand(shape, device=device).to(dtype)
            if form != "sse":
                named["weight"] = torch.rand(5, device=device).to(dtype)
            value = loss(**named, **options).sum() * 3
            (expected,) = torch.autograd.grad(value, leaf, retain_graph=True)
            value = loss(**named, **options).sum() * 3
            if use == "again":
                torch.autograd.grad(value, leaf, retain_graph=True)
            with torch.no_grad():
                named[name].copy_(named[name].flip(0))
            message = ""
            try:
                (grad,) = torch.autograd.grad(value, leaf, create_graph=use == "create_graph")
                torch.testing.assert_close(grad, expected)
            except RuntimeError as error:
                message = str(error)
            assert not message or "modified by an inplace operation" in message
