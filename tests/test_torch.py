"""Where torch has the same loss, value and gradient are torch's; other losses differ as stated."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchlosses import CrossEntropyError, SumSquaredError

# Both compute in float64, with sums in a different order.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
TORCH_REDUCTIONS = ("sum", "mean", "none")
SHAPES = ((5,), (4, 5), (4, 5, 3), (2, 5, 3, 4))


def assert_same(ours: Tensor, theirs: Tensor, *arguments: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, arguments, upstream)
    expected = torch.autograd.grad(theirs, arguments, upstream)
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, **CLOSE)


def randn(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def classes(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(5, shape[:1] * (len(shape) > 1) + shape[2:], device=device)


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("shape", [(), *SHAPES])
def test_half_of_mse_loss(shape: tuple[int, ...], reduction: Any, device: str) -> None:
    input, target = randn(*shape, device=device), randn(*shape, device=device)
    ours = SumSquaredError(reduction=reduction)(input, target)
    assert_same(ours, F.mse_loss(input, target, reduction=reduction) / 2, input, target)


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ignored", [None, -100, 2])
def test_cross_entropy_of_class_indices(
    shape: tuple[int, ...],
    reduction: Any,
    weighted: bool,
    label_smoothing: float,
    ignored: int | None,
    device: str,
) -> None:
    input, target = randn(*shape, device=device), classes(shape, device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64, device=device) + 0.1
    if ignored is not None:
        options["ignore_index"] = ignored
        target = target.clone()
        target.view(-1)[1:2] = ignored
    ours = CrossEntropyError(from_logits=True, delta=0, **options)(input, target)
    assert_same(ours, F.cross_entropy(input, target, **options), input)


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_of_soft_targets(
    shape: tuple[int, ...], reduction: Any, weighted: bool, label_smoothing: float, device: str
) -> None:
    input = randn(*shape, device=device)
    target = randn(*shape, device=device).detach().softmax(min(1, len(shape) - 1)).requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64, device=device)
    ours = CrossEntropyError(from_logits=True, delta=0, **options)(input, target)
    assert_same(ours, F.cross_entropy(input, target, **options), input, target)


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss_of_the_guarded_log(
    shape: tuple[int, ...], reduction: Any, weighted: bool, device: str
) -> None:
    input = randn(*shape, device=device).detach().softmax(min(1, len(shape) - 1)).requires_grad_()
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64, device=device)
    target = classes(shape, device)
    ours = CrossEntropyError(**options)(input, target)
    assert_same(ours, F.nll_loss((input + 1e-7).log(), target, **options), input)


def test_dim_equals_a_transpose(device: str) -> None:
    input = randn(2, 3, 5, device=device)
    target = torch.randint(5, (2, 3), device=device)
    ours = CrossEntropyError(from_logits=True, delta=0, dim=-1)(input, target)
    assert_same(ours, F.cross_entropy(input.transpose(1, 2), target, reduction="sum"), input)


def test_bce_loss_is_another_loss(device: str) -> None:
    input = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64, device=device)
    target = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    binary = F.binary_cross_entropy(input, target, reduction="sum")
    ours = CrossEntropyError(delta=0)(input, target)
    # It adds −log(1−y) for the other classes.
    torch.testing.assert_close(binary - ours, -(1 - input[0, 1:]).log().sum(), **CLOSE)


def test_clipping_as_keras_does_is_another_loss(device: str) -> None:
    input = torch.tensor([[0.0, 0.5]], dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0], device=device)
    normalized = input / input.sum(1, keepdim=True)
    clipped = F.nll_loss(normalized.clamp(1e-7, 1 - 1e-7).log(), target)
    assert torch.autograd.grad(clipped, input)[0].tolist() == [[0, 0]]
    loss = CrossEntropyError()(input, target)
    assert torch.autograd.grad(loss, input)[0].tolist() == [[pytest.approx(-1e7), 0]]
    right = torch.tensor([1], device=device)
    clipped = F.nll_loss(normalized.clamp(1e-7, 1 - 1e-7).log(), right)
    assert CrossEntropyError()(input, right).item() - clipped.item() == pytest.approx(
        0.693147, 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    input = torch.full((400, 400), 2.0, dtype=dtype, device=device)
    loss = SumSquaredError()(input, torch.zeros_like(input))
    assert loss.dtype == torch.float32
    assert loss.item() == 320_000
    if dtype == torch.float16:
        assert F.mse_loss(input, torch.zeros_like(input), reduction="sum").isinf()


def test_mean_over_no_samples_is_zero_where_torch_has_nan(device: str) -> None:
    input, target = randn(3, 5, device=device), torch.full((3,), -100, device=device)
    assert F.cross_entropy(input, target).isnan()
    loss = CrossEntropyError(from_logits=True, reduction="mean")(input, target)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, input)[0].count_nonzero() == 0


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32),
                                    (torch.float16, torch.bfloat16)], ids=str)  # fmt: skip
def test_different_dtypes_promote(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    input = torch.rand(4, 5, dtype=dtypes[0], device=device, requires_grad=True)
    target = torch.rand(4, 5, dtype=dtypes[1], device=device, requires_grad=True)
    for criterion in (SumSquaredError(), CrossEntropyError()):
        loss = criterion(input, target)
        assert loss.dtype == torch.promote_types(*dtypes)
        grads = torch.autograd.grad(loss, (input, target))
        assert tuple(grad.dtype for grad in grads) == dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, device: str) -> None:
    for input_dtype in (dtype, torch.float32):
        input = torch.rand(4, 5, device=device).to(input_dtype).requires_grad_()
        target = torch.rand(4, 5, device=device).to(input_dtype)
        for criterion in (
            SumSquaredError(),
            CrossEntropyError(),
            CrossEntropyError(from_logits=True),
        ):
            expected = criterion(input, target)
            with torch.autocast(device, dtype):
                loss = criterion(input, target)
            assert loss.dtype == torch.float32
            assert loss.item() == expected.item()
            torch.testing.assert_close(
                *(torch.autograd.grad(value, input)[0] for value in (loss, expected)),
                rtol=0,
                atol=0,
            )
