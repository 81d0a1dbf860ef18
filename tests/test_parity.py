"""Value and gradient agree with the NumPy reference, in every dtype."""

import functools
import os
from typing import Any

import numpy as np
import pytest
import torch
from samples import SAMPLES, Sample

from torchlosses import CrossEntropyError
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

# The largest rounding error of a gradient, in units in the last place: Triton's interpreter
# truncates float32 to bfloat16.
UNITS = 1 if os.environ.get("TRITON_INTERPRET") == "1" else 0.5

# (rtol, atol) of the value and of the gradient, against float64 with the same rounded arguments.
TOLERANCES = {
    # A few roundings of 1.1e-16 each; sums of at most 120 terms.
    torch.float64: ((1e-12, 1e-13), (1e-12, 1e-13)),
    # The same with 6e-8; the absolute error of log(y + δ) near y = 1 is one rounding of 1.
    torch.float32: ((2e-6, 5e-7), (2e-6, 5e-7)),
    # The value is computed in float32. The gradient is rounded once, at the end: by half a unit in
    # the last place of 11 or 8 bits, or by half the smallest subnormal number.
    torch.float16: ((2e-6, 5e-7), (1.01 * 2**-11, 2**-24)),
    torch.bfloat16: ((2e-6, 5e-7), (UNITS * 1.01 * 2**-7, 5e-7)),
}


def assert_matches_reference(sample: Sample, dtype: torch.dtype, device: str) -> None:
    input, target, options = sample.tensors(dtype, device)
    input.requires_grad_()
    value = sample.function(input, target, **options)
    (grad,) = torch.autograd.grad(value.sum(), input)
    expected_value, expected_grad = sample.reference(dtype)
    (rtol, atol), (grad_rtol, grad_atol) = TOLERANCES[dtype]

    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == expected_value.shape
    assert grad.dtype == dtype
    overflow = np.copysign(np.inf, expected_grad)
    is_beyond = np.abs(expected_grad) > torch.finfo(dtype).max
    expected_grad = np.where(is_beyond, overflow, expected_grad)
    close = functools.partial(torch.testing.assert_close, equal_nan=True)
    close(value.detach().double().cpu(), torch.tensor(expected_value), rtol=rtol, atol=atol)
    close(grad.double().cpu(), torch.tensor(expected_grad), rtol=grad_rtol, atol=grad_atol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_matches_reference(sample: Sample, dtype: torch.dtype, device: str) -> None:
    assert_matches_reference(sample, dtype, device)


@pytest.mark.parametrize("from_logits", [False, True])
def test_log_0_is_nan_at_a_class_weight_of_0(from_logits: bool, device: str) -> None:
    y = torch.tensor([[-torch.inf, 0.0]] if from_logits else [[0.0, 1.0]], device=device)
    weight = torch.tensor([0.0, 1.0], device=device)
    loss = CrossEntropyError(weight=weight, delta=0, from_logits=from_logits)
    assert loss(y, torch.full_like(y, 0.5)).isnan()
    assert loss(y, torch.tensor([[0.0, 1.0]], device=device)) == 0


@pytest.mark.parametrize("from_logits", [False, True])
def test_class_weights_of_any_strides(from_logits: bool, device: str) -> None:
    y, target = torch.rand(2, 4, 5, device=device)
    weight = torch.rand(10, device=device)[::2]
    value, expected = (
        CrossEntropyError(weight=w, from_logits=from_logits, reduction="none")(y, target)
        for w in (weight, weight.clone())
    )
    torch.testing.assert_close(value, expected)


def test_any_nonzero_byte_of_a_bool_tensor_is_true(device: str) -> None:
    """For example a mask of 0 and 255 from an image, viewed as bool."""
    y = torch.rand(3, 5, device=device).softmax(1)
    image = torch.tensor([[0, 255, 0, 1, 0], [2, 0, 0, 0, 0], [0, 128, 0, 0, 7]], device=device)
    mask = image.to(torch.uint8).view(torch.bool)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (sum_squared_error, {"target": mask}),
        (sum_squared_error, {"target": mask, "sample_weight": mask}),
        (cross_entropy_error, {"target": mask, "weight": mask[0], "sample_weight": mask[:, 1]}),
        (cross_entropy_error, {"target": mask, "from_logits": True, "label_smoothing": 0.1}),
        (linear_cross_entropy_error, {"target": mask, "linear_weight": torch.eye(5).to(device)}),
    ]
    for loss, options in calls:
        zeros_and_ones = {
            name: (value.view(torch.uint8) != 0)
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool
            else value
            for name, value in options.items()
        }
        torch.testing.assert_close(loss(y, **options), loss(y, **zeros_and_ones))
