"""Loss and gradient in one pass on the GPU, in Triton; the only file that imports it.

A loss is bound by memory, so what counts is how often a byte of a tensor comes from memory or goes
there: each kernel says what it reads (R) and writes (W), with y or x the input and t a dense
target. Nothing here waits for the device: what the host does not know is read by the kernels.

Arguments are canonical. `input` is contiguous and has the shape (outer, classes) or (outer,
classes, inner), a dense target likewise. A target of class indices comes as the caller gave it, in
any integer dtype, with 1 in the place of classes: a sample of class `ignore_index` (None where
nothing is ignored) counts for nothing, and one of no class at all is not looked up, its loss and
its row of the gradient are NaN. Rows of either are not read, but where samples lie side by side.
`scale`, the factor of each sample's loss, has the shape of such a target, in any strides, or is
None; `divisor` divides them all: a number, or a 0-D tensor on the device. Results are computed and
losses returned in `dtype`; a gradient has the dtype of its tensor and is None where `needs` does
not ask for it.

One tile of a kernel is BLOCK_SAMPLES × BLOCK_CLASSES elements. Sample s, counted over outer and
inner together, has class k at element (s // inner · classes + k) · inner + s % inner: with inner =
1 these are rows, and with classes = 1 too it is a flat vector. Offsets have 64 bits.

Programs take blocks of samples in turns. Each adds up its own in a fixed order, and the few partial
sums are added up in a fixed order too, so the same input gives the same bits.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlosses.kernels.cpu import Result

# Programs of a launch at most, and so partial sums: enough to fill every GPU several times over.
MAX_PROGRAMS = 2**12
# Elements that one program takes alone: their time is less than that of a second launch.
ONE_PROGRAM = 2**13
# The default differs by version, and Triton 3.9 warns of that where nothing is said.
FUSION = {"enable_fp_fusion": True}
TINY = torch.finfo(torch.float32).tiny
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    """How many elements a tile has, in float32; half as many in float64."""

    whole: int  # At most, if it holds all classes of its samples.
    part: int  # Otherwise: it moves over the classes.


# Fixed configurations; nothing is tuned at run time, so the first call is quick, and no result
# depends on what was fastest once.
ELEMENTS = Tile(whole=2**10, part=2**10)
# Rows longer than a tile are looked at again, so fewer in flight is more of them in cache.
ROWS = Tile(whole=2**12, part=2**12)
ROWS_OF_CLASS = Tile(whole=2**13, part=2**12)
# A tile of few classes takes samples until it has this many elements.
LEAST = 2**10
# Samples of a tile at least where samples, not classes, lie next to each other in memory: 128 bytes
# of the narrowest dtype.
SPATIAL_SAMPLES = 2**6
# More elements for each warp spill registers, and so does the compiler's own choice of how many
# registers a thread has: it takes what the hardware has, 255, and 2¹⁶ for all threads of a program.
PER_WARP = 2**8


def squared_error(input: Tensor, target: Tensor, *, is_index: bool, **common: Any) -> Result:
    """½ (y − t)² and y − t: R y, R t, W the gradient; of class indices R y, W the gradient."""
    return _run(
        _elements_kernel, ELEMENTS, input, target, is_index=is_index, is_per_element=True,
        is_flat=not is_index, delta=1.0, kept=1.0, uniform=0.0,
        IS_INDEX=is_index, IS_SQUARE=True, CAN_BE_0=False, **common,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
    **common: Any,
) -> Result:
    """− Σₖ wₖ tₖ log(yₖ + δ) of whole rows: R y, R t, W the gradient; of class indices no t."""
    options: dict[str, Any] = {
        "is_index": is_index,
        "weight_ptr": None if weight is None else weight.contiguous(),
        "delta": float(delta),
        "kept": 1.0 - label_smoothing,
        "uniform": label_smoothing / input.shape[1],
        "IS_INDEX": is_index,
        "CAN_BE_0": delta < TINY,
        **common,
    }
    if from_logits:
        return _run(_softmax_kernel, ROWS, input, target, IS_EXACT=delta == 0, **options)
    options["is_flat"] = common["is_sum"] and not is_index and weight is None
    return _run(_elements_kernel, ELEMENTS, input, target, IS_SQUARE=False, **options)


def cross_entropy_of_class(
    input: Tensor, target: Tensor, *, delta: float, from_logits: bool, **common: Any
) -> Result:
    """− log(y_c + δ) of one class per row: W the gradient; from logits R x too."""
    common |= {"is_index": True, "delta": float(delta)}
    if from_logits:
        return _run(
            _softmax_of_class_kernel, ROWS_OF_CLASS, input, target, IS_EXACT=delta == 0, **common
        )
    return _run(_class_kernel, ELEMENTS, input, target, **common)


def rescale(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiplies a gradient by that of its loss, in place: R and W it, or nothing if that is 1."""
    sizes = zip(grad_loss.shape, grad_loss.stride(), strict=True)
    if any(stride and size > 1 for size, stride in sizes):
        return gradient.mul_(grad_loss)  # One factor per sample or element, seldom all of them 1.
    programs = min(triton.cdiv(gradient.numel(), ELEMENTS.part), MAX_PROGRAMS)
    with torch.cuda.device_of(gradient):
        _rescale_kernel[(programs,)](
            gradient, grad_loss, gradient.numel(), BLOCK=ELEMENTS.part, **FUSION
        )
    return gradient


def _run(
    kernel: Any,
    tile: Tile,
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    scale: Tensor | None,
    divisor: Tensor | float,
    dtype: torch.dtype,
    is_sum: bool,
    needs: tuple[bool, bool],
    ignore_index: int | None = None,
    is_flat: bool = False,
    is_per_element: bool = False,
    **options: Any,
) -> Result:
    """Launches a kernel. `is_flat`: with one factor for all, its elements need no classes."""
    outer, classes = input.shape[:2]
    inner = input.shape[2:].numel()
    samples_shape = (outer, 1, *input.shape[2:])
    scale_strides = (0, 0)
    if scale is not None:
        scale_strides = (scale.stride(0), scale.stride(2) if input.dim() == 3 else 0)
    samples = outer * inner
    if is_flat and scale_strides == (0, 0):
        samples, classes, inner = input.numel(), 1, 1
    block_samples, block_classes, num_warps, is_whole = _configure(tile, classes, inner, dtype)
    if tile is not ELEMENTS:
        options["IS_WHOLE"] = is_whole

    programs = min(triton.cdiv(samples, block_samples), MAX_PROGRAMS)
    if is_sum:
        if samples * classes <= ONE_PROGRAM:
            programs = 1
        loss = input.new_empty(() if programs == 1 else programs, dtype=dtype)
    else:
        loss = input.new_empty(input.shape if is_per_element else samples_shape, dtype=dtype)
    grad_input = torch.empty_like(input) if needs[0] else None
    grad_target = torch.empty_like(target) if needs[1] else None
    if is_index:
        options["ignore_index"] = ignore_index
    elif grad_target is not None:
        options["grad_target_ptr"] = grad_target
    is_divided = isinstance(divisor, Tensor)

    with torch.cuda.device_of(input):
        kernel[(programs,)](
            input,
            target.view(torch.uint8) if target.dtype == torch.bool else target,
            scale,
            divisor if is_divided else None,
            loss,
            grad_input,
            samples,
            classes,
            inner,
            *scale_strides,
            1.0 if is_divided else 1.0 / divisor,
            **options,
            IS_SUM=is_sum,
            DTYPE=DTYPES[dtype],
            CLASSES_ALIGNMENT=math.gcd(classes, 16) if inner == 1 else 1,
            INNER_ALIGNMENT=math.gcd(inner, 16),
            BLOCK_SAMPLES=block_samples,
            BLOCK_CLASSES=block_classes,
            num_warps=num_warps,
            maxnreg=min(255, 2**16 // (32 * num_warps)),
            **FUSION,
        )
    return Result(loss.sum() if is_sum and programs > 1 else loss, grad_input, grad_target)


def _configure(
    tile: Tile, classes: int, inner: int, dtype: torch.dtype
) -> tuple[int, int, int, bool]:
    """Samples and classes of a tile, its warps, and whether those are all classes."""
    whole, part, least, per_warp = (
        number * 4 // dtype.itemsize for number in (*tile, LEAST, PER_WARP)
    )
    samples = 1 if inner == 1 else SPATIAL_SAMPLES
    width = triton.next_power_of_2(classes)
    is_whole = samples * width <= whole
    if is_whole:
        samples = max(samples, least // width)
    else:
        width = part // samples
    return samples, width, samples * width // per_warp, is_whole


@triton.jit
def _sizes(classes, inner, CLASSES_ALIGNMENT: tl.constexpr, INNER_ALIGNMENT: tl.constexpr):
    """Both in 64 bits, with the powers of 2 that divide them, for the widest loads and stores."""
    classes = tl.multiple_of(tl.cast(classes, tl.int64), CLASSES_ALIGNMENT)
    return classes, tl.multiple_of(tl.cast(inner, tl.int64), INNER_ALIGNMENT)


@triton.jit
def _samples(
    block, target_ptr, scale_ptr, divisor_ptr, samples, classes, inner,
    scale_outer_stride, scale_inner_stride, factor, ignore_index,
    IS_INDEX: tl.constexpr, DTYPE: tl.constexpr, INNER_ALIGNMENT: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):  # fmt: skip
    """What is known of the samples of a block.

    Their numbers, whether they exist, whether their rows are read and used, the offset of their
    first class, their class, and the factor of their loss: scale / divisor, 0 if ignored, NaN if of
    no class.
    """
    sample = block * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES).to(tl.int64)
    outside, inside = sample // inner, sample % inner
    is_there = sample < samples
    row = outside * classes * inner + inside
    factor = tl.full((BLOCK_SAMPLES,), factor, DTYPE)
    if scale_ptr is not None:
        offsets = outside * scale_outer_stride + inside * scale_inner_stride
        factor *= tl.load(scale_ptr + offsets, mask=is_there, other=0)
    if divisor_ptr is not None:
        factor /= tl.load(divisor_ptr)
    is_used = is_there
    label = sample
    if IS_INDEX:
        label = tl.load(target_ptr + sample, mask=is_there, other=0)
        if label.dtype == tl.uint64:  # Of what int64 cannot hold, none is a class.
            label = tl.minimum(label, 2**63 - 1)
        label = label.to(tl.int64)
        is_class = (label >= 0) & (label < classes)
        factor = tl.where(is_class, factor, float("nan"))
        if ignore_index is not None:
            is_used = is_used & (label != ignore_index)
        factor = tl.where(is_used, factor, 0)
        is_used = is_used & is_class
    is_read = is_used
    if INNER_ALIGNMENT > 1:  # Samples side by side are loaded together: wide, if all of them are.
        is_read = is_there
    return sample, is_there, is_read, is_used, row, label, factor


@triton.jit
def _tile(row, label, start, classes, inner, BLOCK_CLASSES: tl.constexpr):
    """Classes of a tile, its offsets, which classes exist, and which is that of each sample.

    Counted from `start` they fit 32 bits, which is half the registers.
    """
    k = tl.arange(0, BLOCK_CLASSES)
    in_row = (k < tl.minimum(classes - start, BLOCK_CLASSES).to(tl.int32))[None, :]
    label -= start
    label = tl.where((label >= 0) & (label < BLOCK_CLASSES), label, -1).to(tl.int32)
    offsets = (row + start * inner)[:, None] + (k.to(tl.int64) * inner)[None, :]
    return start + k, offsets, in_row, label[:, None] == k[None, :]


@triton.jit
def _targets(
    target_ptr, weight_ptr, k, offsets, is_used, in_row, is_label, kept, uniform,
    IS_INDEX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """w·((1−ε)·t + ε/C), whether that is 0 but for w, and its derivative by t."""
    is_read = is_used[:, None] & in_row
    if IS_INDEX:
        t = tl.where(is_label, 1.0, 0.0).to(DTYPE)
    else:
        t = tl.load(target_ptr + offsets, mask=is_read, other=0).to(DTYPE)
    kept = tl.full((1, 1), kept, DTYPE)
    t = t * kept + tl.full((), uniform, DTYPE)
    is_0 = (t == 0) | ~is_read
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + k[None, :], mask=in_row, other=0)
        t *= weight
        kept *= weight
    return tl.where(is_read, t, 0), is_0, kept


@triton.jit
def _guarded(y, is_0, delta, CAN_BE_0: tl.constexpr, DTYPE: tl.constexpr):
    """y + δ, but 1 where 0·log 0 is to be 0: of a target that is 0, not of a weight."""
    guarded = y + tl.full((), delta, DTYPE)
    if CAN_BE_0:
        guarded = tl.where(is_0 & (guarded == 0), 1, guarded)
    return guarded


@triton.jit
def _take(loss, total, loss_ptr, sample, is_there, IS_SUM: tl.constexpr):
    """The total with the losses of a block in it, or these stored, one for each sample."""
    if IS_SUM:
        total += loss
    else:
        tl.store(loss_ptr + sample, loss, mask=is_there)
    return total


@triton.jit
def _store_slope(gradient_ptr, offsets, slope, is_written):
    """Nothing reads it again here, so it shall not push from the cache what is looked at again."""
    if gradient_ptr is not None:
        tl.store(gradient_ptr + offsets, slope, mask=is_written, eviction_policy="evict_first")


@triton.jit
def _elements_kernel(
    input_ptr, target_ptr, scale_ptr, divisor_ptr, loss_ptr, grad_input_ptr,
    samples, classes, inner, scale_outer_stride, scale_inner_stride,
    factor: tl.float64, delta: tl.float64, kept: tl.float64, uniform: tl.float64,
    IS_SQUARE: tl.constexpr, IS_INDEX: tl.constexpr, CAN_BE_0: tl.constexpr, IS_SUM: tl.constexpr,
    DTYPE: tl.constexpr, CLASSES_ALIGNMENT: tl.constexpr, INNER_ALIGNMENT: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    weight_ptr=None, ignore_index=None, grad_target_ptr=None,
):  # fmt: skip
    """½ (y − t)², or −t·log(y + δ): R y, R t if dense, W each gradient."""
    classes, inner = _sizes(classes, inner, CLASSES_ALIGNMENT, INNER_ALIGNMENT)
    total = tl.zeros((BLOCK_SAMPLES, BLOCK_CLASSES), DTYPE)
    first_block = tl.program_id(0).to(tl.int64)
    for block in range(first_block, tl.cdiv(samples, BLOCK_SAMPLES), tl.num_programs(0)):
        sample, is_there, is_read, is_used, row, label, scale = _samples(
            block, target_ptr, scale_ptr, divisor_ptr, samples, classes, inner,
            scale_outer_stride, scale_inner_stride, factor, ignore_index,
            IS_INDEX, DTYPE, INNER_ALIGNMENT, BLOCK_SAMPLES,
        )  # fmt: skip
        if not IS_SUM:
            total = tl.zeros((BLOCK_SAMPLES, BLOCK_CLASSES), DTYPE)
        for start in range(0, classes, BLOCK_CLASSES):
            k, offsets, in_row, is_label = _tile(row, label, start, classes, inner, BLOCK_CLASSES)
            y = tl.load(input_ptr + offsets, mask=is_read[:, None] & in_row, other=0).to(DTYPE)
            y = tl.where(is_used[:, None], y, 0)
            t, is_0, by_target = _targets(
                target_ptr, weight_ptr, k, offsets, is_used, in_row, is_label, kept, uniform,
                IS_INDEX, DTYPE,
            )  # fmt: skip
            if IS_SQUARE:
                slope = y - t
                target_slope = -slope
                term = slope * slope * 0.5
            else:
                guarded = _guarded(y, is_0, delta, CAN_BE_0, DTYPE)
                log = tl.log(guarded)
                slope = -t / guarded
                target_slope = -log * by_target
                term = -t * log
            term *= scale[:, None]
            slope *= scale[:, None]
            target_slope *= scale[:, None]
            is_written = is_there[:, None] & in_row
            _store_slope(grad_input_ptr, offsets, slope, is_written)
            _store_slope(grad_target_ptr, offsets, target_slope, is_written)
            if IS_SQUARE and not IS_SUM:
                tl.store(loss_ptr + offsets, term, mask=is_written)
            else:
                total += term
        if not IS_SQUARE and not IS_SUM:
            tl.store(loss_ptr + sample, tl.sum(total, 1), mask=is_there)
    if IS_SUM:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _class_kernel(
    input_ptr, target_ptr, scale_ptr, divisor_ptr, loss_ptr, grad_input_ptr,
    samples, classes, inner, scale_outer_stride, scale_inner_stride,
    factor: tl.float64, delta: tl.float64, IS_SUM: tl.constexpr,
    DTYPE: tl.constexpr, CLASSES_ALIGNMENT: tl.constexpr, INNER_ALIGNMENT: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, ignore_index=None,
):  # fmt: skip
    """−log(y_c + δ) of a probability: R an index and an entry per sample, W the gradient."""
    classes, inner = _sizes(classes, inner, CLASSES_ALIGNMENT, INNER_ALIGNMENT)
    total = tl.zeros((BLOCK_SAMPLES,), DTYPE)
    first_block = tl.program_id(0).to(tl.int64)
    for block in range(first_block, tl.cdiv(samples, BLOCK_SAMPLES), tl.num_programs(0)):
        sample, is_there, _is_read, is_used, row, label, scale = _samples(
            block, target_ptr, scale_ptr, divisor_ptr, samples, classes, inner,
            scale_outer_stride, scale_inner_stride, factor, ignore_index,
            True, DTYPE, INNER_ALIGNMENT, BLOCK_SAMPLES,
        )  # fmt: skip
        y = tl.load(input_ptr + row + label * inner, mask=is_used, other=0).to(DTYPE)
        guarded = tl.where(is_used, y + tl.full((), delta, DTYPE), 1)
        loss = -tl.log(guarded) * scale
        total = _take(loss, total, loss_ptr, sample, is_there, IS_SUM)
        if grad_input_ptr is not None:
            slope = (-1 / guarded * scale)[:, None]
            rest = tl.where(is_used, 0, scale)[:, None]
            for start in range(0, classes, BLOCK_CLASSES):
                _, offsets, in_row, is_label = _tile(
                    row, label, start, classes, inner, BLOCK_CLASSES
                )
                gradient = tl.where(is_label, slope, rest)
                _store_slope(grad_input_ptr, offsets, gradient, is_there[:, None] & in_row)
    if IS_SUM:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _logits(input_ptr, offsets, is_read, is_used, in_row, DTYPE: tl.constexpr):
    """A tile of logits: 0 in rows that are not used, and −inf beyond the last class."""
    x = tl.load(input_ptr + offsets, mask=is_read[:, None] & in_row, other=0).to(DTYPE)
    return tl.where(in_row, tl.where(is_used[:, None], x, 0), float("-inf"))


@triton.jit
def _normalizers(
    input_ptr, row, label, is_read, is_used, classes, inner,
    DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """max x and Σ exp(x − max x) of rows longer than a tile, in one look.

    Each lane keeps its own until the end, so that no step waits for other warps, and makes one
    exponential a step: of minus the distance between its maximum and the next x.
    """
    # Not −inf, for −inf − (−inf) is NaN, but what is least beside it.
    lowest: tl.constexpr = (
        -1.7976931348623157e308 if tl.float64 == DTYPE else -3.4028234663852886e38
    )
    maximum = tl.full((BLOCK_SAMPLES, BLOCK_CLASSES), lowest, DTYPE)
    normalizer = tl.zeros((BLOCK_SAMPLES, BLOCK_CLASSES), DTYPE)
    for start in range(0, classes, BLOCK_CLASSES):
        _, offsets, in_row, _ = _tile(row, label, start, classes, inner, BLOCK_CLASSES)
        x = _logits(input_ptr, offsets, is_read, is_used, in_row, DTYPE)
        ratio = tl.exp(-tl.abs(x - maximum))
        is_new = x > maximum
        normalizer = tl.where(is_new, normalizer * ratio + 1, normalizer + ratio)
        maximum = tl.where(is_new, x, maximum)
    of_row = tl.max(maximum, 1)
    return of_row, tl.sum(normalizer * tl.exp(maximum - of_row[:, None]), 1)


@triton.jit
def _softmax_of_class_kernel(
    input_ptr, target_ptr, scale_ptr, divisor_ptr, loss_ptr, grad_input_ptr,
    samples, classes, inner, scale_outer_stride, scale_inner_stride,
    factor: tl.float64, delta: tl.float64,
    IS_EXACT: tl.constexpr, IS_WHOLE: tl.constexpr, IS_SUM: tl.constexpr,
    DTYPE: tl.constexpr, CLASSES_ALIGNMENT: tl.constexpr, INNER_ALIGNMENT: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, ignore_index=None,
):  # fmt: skip
    """−log(p_c + δ) and p_c / (p_c + δ) · (pⱼ − [j = c]), p = softmax(x): R x, W the gradient.

    Rows longer than a tile are looked at twice, the second time from their end, which the cache
    still has.
    """
    classes, inner = _sizes(classes, inner, CLASSES_ALIGNMENT, INNER_ALIGNMENT)
    total = tl.zeros((BLOCK_SAMPLES,), DTYPE)
    first_block = tl.program_id(0).to(tl.int64)
    for block in range(first_block, tl.cdiv(samples, BLOCK_SAMPLES), tl.num_programs(0)):
        sample, is_there, is_read, is_used, row, label, scale = _samples(
            block, target_ptr, scale_ptr, divisor_ptr, samples, classes, inner,
            scale_outer_stride, scale_inner_stride, factor, ignore_index,
            True, DTYPE, INNER_ALIGNMENT, BLOCK_SAMPLES,
        )  # fmt: skip
        x_c = tl.load(input_ptr + row + label * inner, mask=is_used, other=0).to(DTYPE)
        if IS_WHOLE:
            _, offsets, in_row, is_label = _tile(row, label, 0, classes, inner, BLOCK_CLASSES)
            x = _logits(input_ptr, offsets, is_read, is_used, in_row, DTYPE)
            maximum = tl.max(x, 1)
            exponential = tl.exp(x - maximum[:, None])
            normalizer = tl.sum(exponential, 1)
        else:
            maximum, normalizer = _normalizers(
                input_ptr, row, label, is_read, is_used, classes, inner,
                DTYPE, BLOCK_SAMPLES, BLOCK_CLASSES,
            )  # fmt: skip
        if IS_EXACT:
            log = x_c - maximum - tl.log(normalizer)
            gate = scale
        else:
            p = tl.exp(x_c - maximum) / normalizer
            guarded = p + tl.full((), delta, DTYPE)
            log = tl.log(guarded)
            gate = p / guarded * scale
        loss = -log * scale
        total = _take(loss, total, loss_ptr, sample, is_there, IS_SUM)
        if grad_input_ptr is not None:
            by_exponential = (gate / normalizer)[:, None]
            if IS_WHOLE:
                of_class = tl.where(is_label, gate[:, None], 0)
                gradient = exponential * by_exponential - of_class
                _store_slope(grad_input_ptr, offsets, gradient, is_there[:, None] & in_row)
            else:
                for step in range(1, tl.cdiv(classes, BLOCK_CLASSES) + 1):
                    start = (tl.cdiv(classes, BLOCK_CLASSES) - step) * BLOCK_CLASSES
                    _, offsets, in_row, is_label = _tile(
                        row, label, start, classes, inner, BLOCK_CLASSES
                    )
                    x = _logits(input_ptr, offsets, is_read, is_used, in_row, DTYPE)
                    of_class = tl.where(is_label, gate[:, None], 0)
                    gradient = tl.exp(x - maximum[:, None]) * by_exponential - of_class
                    _store_slope(grad_input_ptr, offsets, gradient, is_there[:, None] & in_row)
    if IS_SUM:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _operands(
    input_ptr, target_ptr, weight_ptr, row, label, is_read, is_used, start, classes, inner,
    kept, uniform, IS_INDEX: tl.constexpr, DTYPE: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """A tile of logits, what `_targets` says of it, its offsets, and which classes exist."""
    k, offsets, in_row, is_label = _tile(row, label, start, classes, inner, BLOCK_CLASSES)
    x = _logits(input_ptr, offsets, is_read, is_used, in_row, DTYPE)
    t, is_0, by_target = _targets(
        target_ptr, weight_ptr, k, offsets, is_used, in_row, is_label, kept, uniform,
        IS_INDEX, DTYPE,
    )  # fmt: skip
    return x, t, is_0, by_target, offsets, in_row


@triton.jit
def _softmax(
    x, t, is_0, maximum, normalizer, delta,
    IS_EXACT: tl.constexpr, CAN_BE_0: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """p = softmax(x), log(p + δ) and t·p / (p + δ)."""
    shifted = x - maximum[:, None]
    p = tl.exp(shifted) * (1 / normalizer)[:, None]
    if IS_EXACT:
        log = shifted - tl.log(normalizer)[:, None]
        log = tl.where(is_0 & (log == float("-inf")), 0, log)  # 0·log 0 is 0.
        return p, log, t
    else:  # noqa: RET505 - Only one branch is compiled.
        guarded = _guarded(p, is_0, delta, CAN_BE_0, DTYPE)
        return p, tl.log(guarded), t * p / guarded


@triton.jit
def _softmax_kernel(
    input_ptr, target_ptr, scale_ptr, divisor_ptr, loss_ptr, grad_input_ptr,
    samples, classes, inner, scale_outer_stride, scale_inner_stride,
    factor: tl.float64, delta: tl.float64, kept: tl.float64, uniform: tl.float64,
    IS_EXACT: tl.constexpr, IS_WHOLE: tl.constexpr, IS_INDEX: tl.constexpr,
    CAN_BE_0: tl.constexpr, IS_SUM: tl.constexpr,
    DTYPE: tl.constexpr, CLASSES_ALIGNMENT: tl.constexpr, INNER_ALIGNMENT: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    weight_ptr=None, ignore_index=None, grad_target_ptr=None,
):  # fmt: skip
    """−Σ t·log(p + δ) and pⱼ·S − gⱼ, p = softmax(x), gₖ = tₖpₖ/(pₖ+δ), S = Σ g.

    R x, R t if dense, W each gradient. Rows longer than a tile are looked at again, each time from
    where the last look ended, in cache: for S, which needs the normalizer, and for the gradient,
    which needs S. With δ = 0, S is Σ t and the look for it leaves x alone.
    """
    classes, inner = _sizes(classes, inner, CLASSES_ALIGNMENT, INNER_ALIGNMENT)
    total = tl.zeros((BLOCK_SAMPLES,), DTYPE)
    first_block = tl.program_id(0).to(tl.int64)
    for block in range(first_block, tl.cdiv(samples, BLOCK_SAMPLES), tl.num_programs(0)):
        sample, is_there, is_read, is_used, row, label, scale = _samples(
            block, target_ptr, scale_ptr, divisor_ptr, samples, classes, inner,
            scale_outer_stride, scale_inner_stride, factor, ignore_index,
            IS_INDEX, DTYPE, INNER_ALIGNMENT, BLOCK_SAMPLES,
        )  # fmt: skip
        if IS_WHOLE:
            x, t, is_0, by_target, offsets, in_row = _operands(
                input_ptr, target_ptr, weight_ptr, row, label, is_read, is_used, 0, classes, inner,
                kept, uniform, IS_INDEX, DTYPE, BLOCK_CLASSES,
            )  # fmt: skip
            maximum = tl.max(x, 1)
            normalizer = tl.sum(tl.exp(x - maximum[:, None]), 1)
            p, log, gated = _softmax(
                x, t, is_0, maximum, normalizer, delta, IS_EXACT, CAN_BE_0, DTYPE
            )
            slope = (p * tl.sum(gated, 1)[:, None] - gated) * scale[:, None]
            target_slope = -log * by_target * scale[:, None]
            is_written = is_there[:, None] & in_row
            _store_slope(grad_input_ptr, offsets, slope, is_written)
            _store_slope(grad_target_ptr, offsets, target_slope, is_written)
            loss = -tl.sum(t * log, 1) * scale
        else:
            maximum, normalizer = _normalizers(
                input_ptr, row, label, is_read, is_used, classes, inner,
                DTYPE, BLOCK_SAMPLES, BLOCK_CLASSES,
            )  # fmt: skip
            s = tl.zeros((BLOCK_SAMPLES, BLOCK_CLASSES), DTYPE)
            if grad_input_ptr is not None:
                for step in range(1, tl.cdiv(classes, BLOCK_CLASSES) + 1):
                    start = (tl.cdiv(classes, BLOCK_CLASSES) - step) * BLOCK_CLASSES
                    x, t, is_0, _, _, _ = _operands(
                        input_ptr, target_ptr, weight_ptr, row, label, is_read, is_used, start,
                        classes, inner, kept, uniform, IS_INDEX, DTYPE, BLOCK_CLASSES,
                    )  # fmt: skip
                    _, _, gated = _softmax(
                        x, t, is_0, maximum, normalizer, delta, IS_EXACT, CAN_BE_0, DTYPE
                    )
                    s += gated
            s = tl.sum(s, 1)[:, None]
            terms = tl.zeros((BLOCK_SAMPLES, BLOCK_CLASSES), DTYPE)
            for start in range(0, classes, BLOCK_CLASSES):
                x, t, is_0, by_target, offsets, in_row = _operands(
                    input_ptr, target_ptr, weight_ptr, row, label, is_read, is_used, start, classes,
                    inner, kept, uniform, IS_INDEX, DTYPE, BLOCK_CLASSES,
                )  # fmt: skip
                p, log, gated = _softmax(
                    x, t, is_0, maximum, normalizer, delta, IS_EXACT, CAN_BE_0, DTYPE
                )
                slope = (p * s - gated) * scale[:, None]
                target_slope = -log * by_target * scale[:, None]
                is_written = is_there[:, None] & in_row
                _store_slope(grad_input_ptr, offsets, slope, is_written)
                _store_slope(grad_target_ptr, offsets, target_slope, is_written)
                terms += t * log
            loss = -tl.sum(terms, 1) * scale
        total = _take(loss, total, loss_ptr, sample, is_there, IS_SUM)
    if IS_SUM:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _rescale_kernel(gradient_ptr, grad_loss_ptr, numel, BLOCK: tl.constexpr):
    """R and W the gradient, but R the factor alone if it is 1."""
    factor = tl.load(grad_loss_ptr)
    if factor != 1:
        first_block = tl.program_id(0).to(tl.int64)
        for block in range(first_block, tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            offsets = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            gradient = tl.load(gradient_ptr + offsets, mask=offsets < numel).to(factor.dtype)
            tl.store(gradient_ptr + offsets, gradient * factor, mask=offsets < numel)
