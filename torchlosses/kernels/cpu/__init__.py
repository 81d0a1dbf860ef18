"""Loss and gradient in one pass on the CPU: what the kernels of `module.cpp` need of Python.

Without a compiler at installation there are none, and this module cannot be imported.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchlosses import checks
from torchlosses.formulas import Call
from torchlosses.kernels.cpu import _cpu
from torchlosses.kernels.cpu._cpu import compute, find_key, rescale, serve

__all__ = ["LOSSES", "compute", "empty", "find_key", "rescale", "serve"]

LOSSES = ("squares", "probabilities", "logits")


def empty(like: Tensor) -> Tensor:
    """Memory like a contiguous tensor's; fresh memory in huge pages, where Linux grants them."""
    return _cpu.empty(like, like.nbytes)


def _expand(call: Call, sample_weight: Tensor, shape: torch.Size) -> tuple[Tensor, bool]:
    """Sample weights in full, and whether they are one per element instead of one per sample."""
    samples = shape[: call.dim] + shape[call.dim + 1 :]
    is_elementwise = False
    if call.kind == "squares" and not call.is_index and shape:
        place = sample_weight.dim() - len(shape) + call.dim
        if place >= 0:
            is_elementwise = sample_weight.shape[place] > 1
            if not is_elementwise:
                sample_weight = sample_weight.squeeze(place)
    full = shape if is_elementwise else samples
    return sample_weight.expand(full), is_elementwise


def _complain(call: Call, target: Tensor, position: int, shape: torch.Size) -> None:
    raise checks.bad_class(target, position, shape[call.dim], call.ignore_index)


def _find_threads() -> int | None:
    """The address of torch's own function to run in parallel, whose threads the kernels share.

    Without it they run in one.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        function = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


_cpu.set_up(
    _find_threads(),
    (
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    ),
    # To make another like it takes half the time of making one by its shape.
    tuple(torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)),
    torch.empty_like,
    _expand,
    _complain,
    checks.PLAIN,
    (
        checks.is_tracing, checks.is_before_dispatch, checks.count_modes,
        checks.are_transforms_active, torch.is_anomaly_enabled,
    ),
    torch.is_grad_enabled,
    forward_ad,
)  # fmt: skip
