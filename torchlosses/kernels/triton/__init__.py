"""Loss and gradient in one pass on the GPU, in Triton, which nothing else imports.

A loss is bound by memory, so what counts is how often a byte of a tensor comes from memory or goes
there: each form of the kernel says what it reads (R) and writes (W), with y or x the input and t a
dense target. Nothing here waits for the device: what the host does not know is read by the kernels.

A small loss is bound by launches. Forward and backward are two of them, whatever the reduction:
`_loss_kernel`, and `_rescale_kernel` or, where the gradient waited for the upstream one,
`_loss_kernel` again. `_count_kernel` is a third, ahead of a gradient of `'mean'` that is divided by
what more than COUNT_ALONE samples, kept or weighted, add up to. Triton takes longer to look at the
arguments than a small loss takes to run, so a kernel that was compiled for one kind of call is
launched without that look from then on.

The input is seen as (outer, classes, inner). A tile has SAMPLES × CLASSES elements, in the shape
(PER_THREAD, SAMPLES, THREADS, VECTOR): what a thread holds of a sample is in the first and the last
dimension. With inner = 1 samples are rows, and with classes = 1 too it is a flat vector; otherwise
samples lie side by side, and a block of them lies in one place of outer. So a place within a block
has 32 bits, counted from the block's first element, and nothing is divided but the block's number.

Programs take blocks of samples in turns. Each adds up its own in a fixed order, and whichever comes
last adds up the partial sums in a fixed order too, so the same input gives the same bits.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlosses.formulas import Call, Result
from torchlosses.kernels.triton.blocks import Given, Plan
from torchlosses.kernels.triton.kernels import (
    COUNT_BLOCK,
    _count_kernel,
    _loss_kernel,
    _rescale_kernel,
)
from torchlosses.kernels.triton.tiles import FEW, _configure

# Programs of a launch at most, and so partial sums: enough to fill every GPU several times over.
MAX_PROGRAMS = 2**12
COUNT_PROGRAMS = 2**9
# Samples at most that each program counts for itself, which takes less time than another launch.
COUNT_ALONE = 2**12
# Elements of a block of `_rescale_kernel`.
RESCALED = 2**11
# Launches that may run at the same time, each with a counter of its own.
COUNTERS = 2**16
# The default differs by version, and Triton 3.9 warns of that where nothing is said.
FUSION = {"enable_fp_fusion": True}
LOSSES = ("squares", "probabilities", "logits")
REDUCTIONS = ("sum", "mean", "batchmean", "none")
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
IS_INTERPRETED = triton.knobs.runtime.interpret

_counter = itertools.cycle(range(COUNTERS))
_counters: dict[torch.device, Tensor] = {}
_rescalers: dict[tuple[Any, ...], Any] = {}


class Launch(NamedTuple):
    """What is known of a call without its tensors."""

    plan: Plan
    warps: int
    registers: int
    programs: int
    counting: int  # Programs of `_count_kernel`, or 0 where it is not needed.
    sizes: tuple[int, int, int]  # As the kernel gets them, one of them in units of ALIGNMENT.
    layout: tuple[int, int, int]  # outer, classes, inner.
    samples_shape: tuple[int, ...]
    losses_shape: tuple[int, ...]
    by_divisor: float
    compiled: dict[tuple[Any, ...], Any]  # By what else Triton specialises on.


def compute(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    needs: tuple[bool, bool],
    upstream: Tensor | None = None,
    over_input: bool = False,
    complains: bool = True,
) -> Result:
    """The loss, and the gradients that `needs` asks for, times `upstream` if that is given.

    Nobody looks at the classes, so a class that is none makes NaN of its sample and is no error.

    The gradient by a contiguous input may be written over it: a program is done with a tile when it
    stores its slopes.
    """
    input, target = input.contiguous(), target.contiguous()
    weights_shape = None if sample_weight is None else sample_weight.shape
    launch = _prepare(call, input.shape, input.dtype, weight is not None, weights_shape, needs)
    plan, dtype = launch.plan, call.dtype
    outer, classes, inner = launch.layout
    weights, weight_strides = _factor(sample_weight, launch.samples_shape, (outer, 1, inner))
    slopes, slope_strides = _factor(
        upstream, launch.losses_shape, (outer, classes if plan.IS_SQUARE else 1, inner)
    )
    loss = input.new_empty(() if plan.IS_REDUCED else launch.losses_shape, dtype=dtype)
    grad_input = None
    if needs[0]:
        grad_input = input if over_input else torch.empty_like(input)
    given = Given(
        input, target, None if weight is None else weight.contiguous(), weights, slopes,
        torch.empty_like(loss) if launch.counting else None, loss, grad_input,
        torch.empty_like(target) if needs[1] else None, *launch.sizes, weight_strides[0],
        weight_strides[2], *slope_strides, call.ignore_index,
    )  # fmt: skip
    partials = counters = None
    if plan.IS_REDUCED:
        partials, counters = loss.new_empty((3, launch.programs)), _find_counters(input.device)
    with torch.cuda.device_of(input):
        tensors = given[: Given._fields.index("outer")]
        kind = (input.device, weight_strides, slope_strides, *map(_kind, tensors))
        if launch.counting:
            counts = loss.new_empty((2, launch.counting))
            arguments: tuple[Any, ...] = (given, counts, counters, next(_counter), plan)
            _run(_count_kernel, launch.counting, arguments, launch.compiled, ("count", *kind))
        arguments = (
            given, partials, counters, next(_counter), launch.by_divisor, call.delta,
            1.0 - call.label_smoothing, call.label_smoothing / classes, plan,
        )  # fmt: skip
        _run(
            _loss_kernel, launch.programs, arguments, launch.compiled, kind,
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
    return loss, given.grad_input_ptr, given.grad_target_ptr


@functools.lru_cache(maxsize=1024)
def _prepare(
    call: Call,
    shape: torch.Size,
    input_dtype: torch.dtype,
    has_weight: bool,
    weights_shape: torch.Size | None,
    needs: tuple[bool, bool],
) -> Launch:
    """Cached: a training loop asks the same of each batch. `weights_shape`: of sample weights."""
    for name, known in ((call.kind, LOSSES), (call.reduction, REDUCTIONS)):
        if name not in known:
            raise ValueError(f"got {name!r}; expected one of {known}, which the kernel knows")
    dim, dtype, is_index = call.dim, call.dtype, call.is_index
    is_square, is_smooth = call.kind == "squares", call.label_smoothing != 0
    is_reduced = call.reduction != "none"
    is_counted = call.reduction == "mean" and (is_index or weights_shape is not None)
    samples_shape: tuple[int, ...] = shape[:dim] + shape[dim + 1 :]
    losses_shape = shape if is_square else torch.Size(samples_shape)
    divisor = 1
    if call.reduction == "batchmean" and len(shape) > 1:
        divisor = shape[0]
    elif call.reduction == "mean" and not is_counted:
        divisor = losses_shape.numel()

    # Elements of which each is a sample, or all have one factor, need no classes.
    is_flat = not (is_index or call.kind == "logits" or is_smooth or has_weight)
    if is_square and is_flat:
        is_flat = not _is_per_sample(weights_shape, shape, dim)
        samples_shape = shape if is_flat else (*shape[:dim], 1, *shape[dim + 1 :])
    elif is_flat:
        is_flat = is_reduced and weights_shape is None
    outer, classes, inner = shape.numel(), 1, 1
    if not is_flat:
        outer, classes, inner = shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()
    form = call.kind + "_of_class" * (is_index and not is_square and not is_smooth)
    is_exact = call.delta == 0
    is_light = not (needs[1] or is_smooth or has_weight)
    tile = _configure(
        form, classes, inner, dtype, input_dtype.itemsize, is_index, is_exact, is_light
    )
    is_spatial = inner > 1
    alignment = math.gcd(tile.alignment, inner if is_spatial else classes)
    blocks = triton.cdiv(outer, tile.samples)
    if is_spatial:
        blocks = outer * triton.cdiv(inner, tile.samples)
    counting = 0
    if is_counted and any(needs) and outer * inner > COUNT_ALONE:
        counting = min(triton.cdiv(outer * inner, COUNT_BLOCK.value), COUNT_PROGRAMS)

    is_fast = not (IS_INTERPRETED or dtype == torch.float64)
    plan = Plan(
        FORM=form,
        DTYPE=DTYPES[dtype],
        LOWEST=torch.finfo(dtype).min,
        INDEX=tl.int32 if classes * inner < 2**31 - 2**16 else tl.int64,
        ALIGNMENT=alignment,
        SAMPLES=tile.samples,
        CLASSES=tile.classes,
        VECTOR=tile.vector,
        PER_THREAD=tile.per_thread,
        THREADS=tile.classes // tile.vector // tile.per_thread,
        IS_SQUARE=is_square,
        IS_INDEX=is_index,
        IS_EXACT=is_exact,
        IS_SMOOTH=is_smooth,
        IS_REDUCED=is_reduced,
        IS_COUNTED=is_counted,
        IS_SPATIAL=is_spatial,
        IS_EAGER=is_index and (is_spatial or tile.samples > 1),
        # Probabilities can be too small for fast instructions where no δ is added.
        IS_FAST=is_fast and not (form == "probabilities" and is_exact),
        IS_WHOLE=tile.is_whole,
        IS_EVEN=classes % tile.classes == 0,
        NUM_CLASSES=classes if tile.is_whole and classes <= FEW else 0,
        HAS_GRADIENT=any(needs),
    )
    # One of them in units, so that it is seen which loads and stores can be wide.
    sizes = (outer, classes, inner // alignment) if is_spatial else (
        outer, classes // alignment, inner
    )  # fmt: skip
    return Launch(
        plan, tile.warps, tile.registers, min(blocks, MAX_PROGRAMS), counting, sizes,
        (outer, classes, inner), samples_shape, losses_shape, 1.0 / divisor, {},
    )  # fmt: skip


def rescale(
    gradients: Sequence[Tensor | None],
    grad_loss: Tensor,
    call: Call | None = None,
    target: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients times that of their loss, in place, as tensors of their own; None for none.

    Of the first, the rows stay 0 that the target of a call ignores.
    """
    grad_loss = grad_loss.resolve_neg()
    rows: list[tuple[Any, ...]] = [()] * len(gradients)
    if gradients[0] is not None and call is not None and target is not None and call.is_index:
        sizes = gradients[0].shape[call.dim :]
        rows[0] = (target.contiguous(), call.ignore_index, sizes.numel(), sizes[1:].numel())
    return [
        None if g is None else _rescale(g.data, grad_loss, *row)
        for g, row in zip(gradients, rows, strict=True)
    ]


def _rescale(
    gradient: Tensor,
    grad_loss: Tensor,
    target: Tensor | None = None,
    ignore_index: int = 1,
    row: int = 1,
    inner: int = 1,
) -> Tensor:
    numbers = (gradient.numel(), ignore_index, row, inner)
    programs = min(triton.cdiv(gradient.numel(), RESCALED), MAX_PROGRAMS)
    kind = (
        gradient.device, _kind(gradient), _kind(grad_loss), _kind(target),
        # What Triton specialises on in a number.
        *((n == 1, n % 16 == 0, -(2**31) <= n < 2**31) for n in numbers),
    )  # fmt: skip
    with torch.cuda.device_of(gradient):
        arguments = (gradient, grad_loss, target, *numbers, RESCALED)
        _run(_rescale_kernel, programs, arguments, _rescalers, kind)
    return gradient


def _run(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    compiled: dict[tuple[Any, ...], Any],
    kind: tuple[Any, ...],
    **options: int,
) -> None:
    """Launches a kernel, and keeps what Triton has compiled for arguments of this kind."""
    binary = compiled.get(kind)
    if binary is not None:
        binary[(programs, 1, 1)](*arguments)
        return
    binary = kernel[(programs,)](*arguments, **options, **FUSION)
    if hasattr(binary, "__getitem__"):  # The interpreter returns None.
        compiled[kind] = binary


def _is_per_sample(weights_shape: torch.Size | None, shape: torch.Size, dim: int) -> bool:
    """Whether weights that broadcast to elements are the same for all classes, and not for all."""
    if weights_shape is None or weights_shape.numel() == 1:
        return False
    dim -= len(shape)
    return -dim > len(weights_shape) or weights_shape[dim] == 1


def _factor(
    factor: Tensor | None, shape: tuple[int, ...], layout: tuple[int, int, int]
) -> tuple[Tensor | None, tuple[int, int, int]]:
    """What broadcasts to `shape`, and its strides where that is seen as `layout`."""
    if factor is None or factor.numel() == 1:
        return factor, (0, 0, 0)
    factor = factor.expand(shape).reshape(layout)
    outer_stride, class_stride, inner_stride = factor.stride()
    return factor, (outer_stride, class_stride, inner_stride)


def _kind(tensor: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What Triton specialises on in a tensor."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)


def _find_counters(device: torch.device) -> Tensor:
    """Zeros, of which a launch takes one and leaves it so; they are there before any launch.

    Launches that share one must not run at the same time, so there are more than ever do.
    """
    counters = _counters.get(device)
    if counters is None:
        is_cuda = device.type == "cuda"
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if is_cuda and torch.cuda.is_current_stream_capturing():
            return counters  # Of this graph, which makes them anew each time.
        if is_cuda:
            torch.cuda.synchronize(device)
        _counters[device] = counters
    return counters
