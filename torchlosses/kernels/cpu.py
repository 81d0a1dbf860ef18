"""Loss and gradient in one pass on the CPU: what is handed to the kernels of `cpu.cpp`.

Without a compiler at installation there are none, and this module cannot be imported.
"""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchlosses import checks
from torchlosses.formulas import Call, Result
from torchlosses.kernels import _cpu

STORAGE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.uint16: 9,
    torch.uint32: 10,
    torch.uint64: 11,
}
# To make another like it takes half the time of making one by its shape.
SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in STORAGE}


def compute(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    needs: tuple[bool, bool],
    upstream: Tensor | None = None,
    *,
    over_input: bool = False,
) -> Result:
    """The loss and its gradients by `input` and `target`, times that from upstream if it comes.

    The gradient by a contiguous input may be written over it.
    """
    shape, dtype, is_reduced = input.shape, call.dtype, call.reduction != "none"
    if not input.is_contiguous():
        input = input.contiguous()
    if not target.is_contiguous():
        target = target.contiguous()
    weights = samples = upstreams = 0
    weighs_elements = False
    if weight is not None:
        weight = weight.to(dtype).contiguous()
        weights = weight.data_ptr()
    if sample_weight is not None:
        sample_weight, weighs_elements = _expanded(call, sample_weight, shape)
        samples = sample_weight.data_ptr()
    if upstream is not None:
        upstream = upstream.to(dtype).contiguous()
        upstreams = upstream.data_ptr()
    if is_reduced:
        loss = torch.empty_like(SCALARS[dtype])
    elif call.kind == "squares":
        loss = input.new_empty(shape, dtype=dtype)
    else:
        loss = input.new_empty(shape[: call.dim] + shape[call.dim + 1 :], dtype=dtype)
    grad_input = grad_target = None
    slopes = slopes_t = 0
    if needs[0]:
        grad_input = input if over_input else empty(input)
        slopes = grad_input.data_ptr()
    if needs[1]:
        grad_target = empty(target)
        slopes_t = grad_target.data_ptr()
    bad = _cpu.compute(
        call, shape, dtype is torch.float64, input.data_ptr(), target.data_ptr(), weights, samples,
        weighs_elements, upstreams, not is_reduced, loss.data_ptr(), slopes, slopes_t,
        STORAGE[input.dtype], STORAGE[target.dtype],
    )  # fmt: skip
    if bad is not None:
        raise checks.bad_class(target, bad, shape[call.dim], call.ignore_index)
    return Result(loss, grad_input, grad_target)


def rescale(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient times that of the reduced loss, in place."""
    return gradient if grad_loss.item() == 1 else gradient.mul_(grad_loss)


def _expanded(call: Call, sample_weight: Tensor, shape: torch.Size) -> tuple[Tensor, bool]:
    """Sample weights in full, and whether they are one per element instead of one per sample."""
    sample_weight = sample_weight.to(call.dtype)
    samples = shape[: call.dim] + shape[call.dim + 1 :]
    is_elementwise = False
    if call.kind == "squares" and not call.is_index and shape:
        place = sample_weight.dim() - len(shape) + call.dim
        if place >= 0:
            is_elementwise = sample_weight.shape[place] > 1
            if not is_elementwise:
                sample_weight = sample_weight.squeeze(place)
    full = shape if is_elementwise else samples
    return sample_weight.expand(full).contiguous(), is_elementwise


# The C library maps fresh memory for every tensor of this many bytes, and the kernel enters each
# page of it at first touch. In pages of 4 kB that takes longer than all arithmetic here.
FRESH = 2**25
HUGE_PAGE = 2**21
# The advice, and libc's function to give it; both are there on Linux only.
HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_advise: Callable[..., int] | None = (
    None if HUGE_PAGES is None else getattr(ctypes.CDLL(None), "madvise", None)
)


def empty(like: Tensor) -> Tensor:
    """Memory like a contiguous tensor's; fresh memory in huge pages, where Linux grants them.

    PyTorch's own allocator asks for them too, for all tensors, under THP_MEM_ALLOC_ENABLE=1. The
    advice changes no value, and where it is not taken nothing is lost but time.
    """
    tensor = torch.empty_like(like)
    if _advise is not None and tensor.nbytes >= FRESH:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        _advise(ctypes.c_void_p(start), ctypes.c_size_t(length), HUGE_PAGES)
    return tensor


def _share_threads() -> None:
    """Hands torch's own function to run in parallel to the kernels, so that they share its threads.

    Without it they run in one.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        function = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
        if function is not None:
            _cpu.set_threads(ctypes.cast(function, ctypes.c_void_p).value)


_share_threads()
