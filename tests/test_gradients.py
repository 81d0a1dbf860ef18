"""First and second derivatives, forwards and backwards, by every argument that may have one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import SAMPLES, Sample
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torchlosses import CrossEntropyError, SumSquaredError

# Small and smooth: finite differences say nothing about 0, ∞ or NaN. Empty ones have no numbers.
SMOOTH = [
    sample
    for sample in SAMPLES
    if 0 < sample.input.size <= 24
    and abs(sample.input).max() < 10
    and not any(word in sample.name for word in ("corners", "nan"))
    and sample.target.dtype.kind in "if"
]
REPRESENTATIVE = [sample for sample in SMOOTH if sample.name.endswith(("-none", "-mean"))]


def differentiable(sample: Sample, device: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The loss as a function of all that has a derivative, and those arguments."""
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
    assert gradcheck(loss, arguments, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("sample", REPRESENTATIVE, ids=lambda sample: sample.name)
def test_gradgradcheck(sample: Sample, device: str) -> None:
    loss, arguments = differentiable(sample, device)
    assert gradgradcheck(loss, arguments, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_any_upstream_gradient_any_number_of_times(sample: Sample, device: str) -> None:
    """Of a loss per element or sample, the reference has the gradient of the sum alone."""
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
def test_documented_gradients(reduction: str, device: str) -> None:
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
        t[:, 2] = 0  # A target of 0 has a gradient as any other.
    by_y, by_t = grads(CrossEntropyError(reduction=reduction, delta=0), 4 if is_mean else 1)
    close(by_y, -t / y)
    close(by_t, -y.log())
    criterion = CrossEntropyError(reduction=reduction, delta=0.1, from_logits=True)
    by_y, by_t = grads(criterion, 4 if is_mean else 1)
    p = y.softmax(1)
    close(by_y, p * ((t * p / (p + 0.1)).sum(1, keepdim=True) - t / (p + 0.1)))
    close(by_t, -(p + 0.1).log())


def test_a_confidently_wrong_sample_is_gated_unless_delta_is_zero(device: str) -> None:
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
    """A gradient inside of the loss: the second derivative of SSE is the identity."""
    y = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(criterion(y, t), y, create_graph=True)
    (penalty,) = torch.autograd.grad(grad.square().sum() / 2, y)
    hessian = torch.autograd.functional.hessian(lambda y: criterion(y, t), y)
    expected = torch.einsum("abcd,ab->cd", hessian, grad)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
    if isinstance(criterion, SumSquaredError):
        torch.testing.assert_close(penalty, y - t)


def test_learned_weights_move(device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(5, device=device))
    criterion = CrossEntropyError(weight=weight, reduction="mean")
    assert list(criterion.parameters()) == [weight]
    y = torch.rand(4, 5, device=device)
    sample_weight = torch.ones(4, device=device, requires_grad=True)
    loss = criterion(y, torch.tensor([0, 1, 2, 2], device=device), sample_weight=sample_weight)
    by_class, by_sample = torch.autograd.grad(loss, (weight, sample_weight))
    # The mean of one loss per sample: what exceeds the mean pulls the weight up.
    losses = -(y[range(4), [0, 1, 2, 2]] + 1e-7).log()
    torch.testing.assert_close(by_sample, (losses - losses.mean()) / 4)
    assert by_class[3:].tolist() == [0, 0]
    torch.testing.assert_close(by_class[2], by_sample[2:].sum())
