"""Whatever the shape, strides, dtype and options: the value and gradient of the reference."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from samples import REDUCTIONS, Sample
from test_parity import assert_matches_reference
from torch import Tensor

from torchlosses import CrossEntropyError, SumSquaredError, fused
from torchlosses.functional import cross_entropy_error, sum_squared_error

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """A call of one of the losses with any valid arguments."""
    is_cross_entropy = draw(st.booleans())
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))
    default = axis == min(1, len(shape) - 1)
    dim = draw(st.sampled_from([axis, axis - len(shape), *[None] * default]))
    classes = shape[axis]
    per_sample = shape[:axis] + shape[axis + 1 :]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    is_index = classes > 0 and draw(st.booleans())
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(REDUCTIONS)), "dim": dim}
    options["ignore_index"] = draw(st.sampled_from([-100, 0, 2, 77]))

    target: NDArray[Any]
    input = rng.normal(size=shape)
    if is_index:
        target = np.asarray(rng.integers(0, classes, per_sample))
        ignored = rng.random(per_sample) < draw(st.sampled_from([0, 0.3, 1]))
        target = np.where(ignored, options["ignore_index"], target)
        kinds = INTEGERS if target.min(initial=0) >= 0 else INTEGERS[::2]
        target = target.astype(draw(st.sampled_from(kinds)))
    elif draw(st.booleans()):
        target = rng.random(shape)
    else:
        kinds = [*INTEGERS, "bool"]
        target = rng.integers(0, 2, shape).astype(draw(st.sampled_from(kinds)))
    if draw(st.booleans()):
        full = shape if not (is_cross_entropy or is_index) else per_sample
        cut = full[draw(st.integers(0, len(full))) :]
        options["sample_weight"] = rng.random([1 if draw(st.booleans()) else n for n in cut])
    if not is_cross_entropy:
        return Sample("drawn", "sum_squared_error", input, target, options)

    options["from_logits"] = draw(st.booleans())
    options["delta"] = draw(st.sampled_from([1e-7, 0, 0.1, 1e-30]))
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        options["weight"] = rng.random(classes)
    if not options["from_logits"]:
        input = rng.uniform(0.01, 1, shape)
    return Sample("drawn", "cross_entropy_error", input, target, options)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(samples(), st.sampled_from(FLOATING))
def test_any_call_matches_reference(sample: Sample, dtype: torch.dtype) -> None:
    for kernels in (fused.KERNELS, {}):  # By kernels, and by the formula.
        with mock.patch.object(fused, "KERNELS", kernels):
            assert_matches_reference(sample, dtype, "cpu")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(samples(), st.randoms(use_true_random=False), st.data())
def test_any_strides_give_the_same(sample: Sample, random: Any, data: st.DataObject) -> None:
    def restrided(tensor: Tensor) -> Tensor:
        """The same values, transposed in memory, sliced out of a wider tensor, or reversed."""
        order = random.sample(range(tensor.dim()), tensor.dim())
        inverse = [order.index(d) for d in range(tensor.dim())]
        tensor = tensor.permute(order).contiguous().permute(inverse)
        if tensor.dim() and data.draw(st.booleans()):
            wide = torch.repeat_interleave(tensor, 2, dim=-1)
            return wide[..., ::2]
        return tensor

    input, target, options = sample.tensors(torch.float64)
    strided = {k: restrided(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    y, other = input.clone().requires_grad_(), restrided(input).detach().requires_grad_()
    loss = sample.function(y, target, **options)
    same = sample.function(other, restrided(target), **strided)
    torch.testing.assert_close(same, loss, rtol=1e-13, atol=1e-13)
    (grad,), (same_grad,) = (
        torch.autograd.grad(value.sum(), leaf) for value, leaf in ((loss, y), (same, other))
    )
    torch.testing.assert_close(same_grad, grad, rtol=1e-13, atol=1e-13)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(samples())
def test_class_indices_are_their_onehot_rows(sample: Sample) -> None:
    assume(sample.is_index)
    input, target, options = sample.tensors(torch.float64)
    ignore_index = options.pop("ignore_index")
    options["reduction"] = "sum"
    kept = target.long() != ignore_index
    assume(kept.all())
    dim = options["dim"]
    axis = min(1, input.dim() - 1) if dim is None else dim % input.dim()
    onehot = torch.nn.functional.one_hot(target.long(), input.shape[axis]).movedim(-1, axis)
    weight = options.pop("sample_weight", None)
    if weight is not None:
        full = weight.expand(target.shape)
        options["sample_weight"] = full if "delta" in options else full.unsqueeze(axis)
    by_row = sample.function(input, onehot, **options)
    if weight is not None:
        options["sample_weight"] = weight
    torch.testing.assert_close(sample.function(input, target, **options), by_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_after_run(dtype: torch.dtype, device: str) -> None:
    y = torch.rand(512, 1000, device=device).to(dtype).requires_grad_()
    soft = torch.rand(512, 1000, device=device).to(dtype)
    index = torch.randint(1000, (512,), device=device)
    for criterion in (
        SumSquaredError(),
        CrossEntropyError(label_smoothing=0.1),
        CrossEntropyError(from_logits=True, reduction="mean"),
    ):
        for target in (soft, index):
            results = [
                (loss.item(), torch.autograd.grad(loss, y)[0])
                for loss in (criterion(y, target) for _ in range(3))
            ]
            for value, grad in results[1:]:
                assert value == results[0][0]
                assert torch.equal(grad, results[0][1])


def test_more_than_2_to_the_31_elements() -> None:
    """A row of which only one entry exists in memory, and is picked behind the 32-bit border."""
    classes = 2**31 + 64
    row = torch.full((1, 1), 0.5).expand(1, classes)
    loss = cross_entropy_error(row, torch.tensor([classes - 1]), delta=0)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    with pytest.raises(IndexError, match=str(classes)):
        cross_entropy_error(row, torch.tensor([classes]))


def test_nan_passes_through(device: str) -> None:
    y = torch.tensor([[0.2, torch.nan], [0.5, 0.5]], device=device)
    t = torch.tensor([1, 0], device=device)
    for from_logits in (False, True):
        loss = cross_entropy_error(y, t, from_logits=from_logits, reduction="none")
        assert loss.isnan().tolist() == [True, False]
    assert sum_squared_error(y, t).isnan()
