"""Loss and gradient in one pass on the CPU: tensors for the kernels of the extension module.

Without a compiler at installation there is none, and this package cannot be imported.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlosses import checks
from torchlosses.formulas import Call, Result
from torchlosses.kernels.cpu import _cpu

CAN_FAIL = False  # What they raise is for the caller.
LOSSES = _cpu.LOSSES
STORAGES = (  # Numbered as in job.h.
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool,
)  # fmt: skip
# To make another like it takes half the time of making one by its shape.
SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in STORAGES[:2]}


def empty(like: Tensor) -> Tensor:
    """Memory like a contiguous tensor's; fresh memory in huge pages, where Linux grants them."""
    tensor = torch.empty_like(like)
    if tensor.nbytes >= _cpu.FRESH:
        _cpu.advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A contiguous tensor of that dtype, and its address."""
    tensor = tensor.to(dtype).contiguous()
    return tensor, tensor.data_ptr()


class Plan:
    """The kernels for calls whose tensors are alike in dtype, shape and strides."""

    def __init__(
        self, call: Call, input: Tensor, target: Tensor, sample_weight: Tensor | None
    ) -> None:
        self.call, shape, dim = call, input.shape, call.dim
        self.are_contiguous = input.is_contiguous() and target.is_contiguous()
        samples = shape[:dim] + shape[dim + 1 :]
        self.loss_shape = None
        if call.reduction == "none":
            self.loss_shape = shape if call.is_per_element else samples
        self.scalar = SCALARS[call.dtype]
        # Per sample, or per element?
        self.weights_shape, self.weights_dim, weighs_elements = samples, -1, False
        if sample_weight is not None and call.is_per_element and not call.is_index and shape:
            self.weights_dim = sample_weight.dim() - len(shape) + dim
            if self.weights_dim >= 0 and sample_weight.shape[self.weights_dim] > 1:
                self.weights_shape, self.weights_dim, weighs_elements = shape, -1, True
        self.prepared = _cpu.prepare(
            LOSSES.index(call.kind), _cpu.REDUCTIONS.index(call.reduction), call.is_index,
            call.dtype == torch.float64, weighs_elements, STORAGES.index(input.dtype),
            STORAGES.index(target.dtype), math.prod(shape[:dim]), math.prod(shape[dim : dim + 1]),
            math.prod(shape[dim + 1 :]), shape[0] if len(shape) > 1 else 1, call.ignore_index,
            call.delta, call.label_smoothing,
        )  # fmt: skip

    def compute(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        needs: Sequence[bool],
        upstream: Tensor | None = None,
        in_place: bool = False,
        raise_on_invalid: bool = True,
    ) -> Result:
        if not self.are_contiguous:
            input, target = input.contiguous(), target.contiguous()
        if self.loss_shape is None:
            loss = torch.empty_like(self.scalar)
        else:
            loss = self.scalar.new_empty(self.loss_shape)
        grad_input = grad_target = None
        by_input = by_target = weights = sample_weights = upstreams = 0
        if needs[0]:
            grad_input = input if in_place else empty(input)
            by_input = grad_input.data_ptr()
        if needs[1]:
            grad_target = empty(target)
            by_target = grad_target.data_ptr()
        if weight is not None:
            weight, weights = _contiguous(weight, self.call.dtype)
        if sample_weight is not None:
            if self.weights_dim >= 0:
                sample_weight = sample_weight.squeeze(self.weights_dim)
            sample_weight = sample_weight.expand(self.weights_shape)
            sample_weight, sample_weights = _contiguous(sample_weight, self.call.dtype)
        if upstream is not None:
            upstream, upstreams = _contiguous(upstream, self.call.dtype)
        bad = _cpu.run(
            self.prepared, input.data_ptr(), target.data_ptr(), weights, sample_weights, upstreams,
            loss.data_ptr(), by_input, by_target,
        )  # fmt: skip
        # Until here the names keep the copies alive; Dynamo drops one that is not used again.
        del weight, sample_weight, upstream
        if bad >= 0 and raise_on_invalid:
            call = self.call
            raise checks.invalid_class(target, bad, input.shape[call.dim], call.ignore_index)
        return loss, grad_input, grad_target

    def rescale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, target: Tensor
    ) -> Sequence[Tensor | None] | None:
        factor = upstream.item()
        if factor == 1:
            return [None if gradient is None else gradient.data for gradient in gradients]
        if not math.isfinite(factor):  # Its product with the 0 of an ignored sample is NaN.
            return None
        return [None if gradient is None else gradient.data.mul_(factor) for gradient in gradients]


def prepare(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Plan:
    """A plan for calls whose tensors are alike in dtype, shape and strides."""
    return Plan(call, input, target, sample_weight)


def _connect() -> bool:
    """Gives the extension the functions of torch's stable C interface that it calls.

    With them it runs in torch's threads and registers operators.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        library = ctypes.CDLL(str(path))
        functions: list[Any] = [getattr(library, name, None) for name in _cpu.TORCH_NAMES]
        if None not in functions:
            addresses: Any = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
            return _cpu.connect(*addresses)
    return False


HAS_OPERATORS = _connect()
