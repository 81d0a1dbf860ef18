"""Loss and gradient in one pass on the GPU, in Triton; the only file that imports it.

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

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from torchlosses import formulas
from torchlosses.formulas import Call, Result

# Programs of a launch at most, and so partial sums: enough to fill every GPU several times over.
MAX_PROGRAMS = 2**12
COUNT_PROGRAMS = 2**9
# Samples of float32 that are counted at a time, and samples at most that each program counts for
# itself, which takes less time than another launch.
COUNT_BLOCK = tl.constexpr(2**10)
COUNT_ALONE = 2**12
# Elements of a block of `_rescale_kernel`.
RESCALED = 2**11
# So many classes at most lie in one thread or two, and are known when the kernel is compiled.
FEW = 32
# Launches that may run at the same time, each with a counter of its own.
COUNTERS = 2**16
# The default differs by version, and Triton 3.9 warns of that where nothing is said.
FUSION = {"enable_fp_fusion": True}
LOSSES = ("squares", "probabilities", "logits")
REDUCTIONS = ("sum", "mean", "batchmean", "none")
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LEAST_DIVISOR = tl.constexpr(formulas.LEAST_DIVISOR)
IS_INTERPRETED = triton.knobs.runtime.interpret
# Among dimensions of equal contiguity Triton 3.6 gives threads to the first one first. Later
# versions begin with the last, which the shape of a tile is made for.
NEEDS_ORDER = tl.constexpr(TorchVersion(triton.__version__) < "3.7")

_counter = itertools.cycle(range(COUNTERS))
_counters: dict[torch.device, Tensor] = {}
_rescalers: dict[tuple[Any, ...], Any] = {}


class Tile(NamedTuple):
    """What a program holds at a time, and how."""

    samples: int
    classes: int
    warps: int
    registers: int  # Of a thread at most: the compiler's own choice spills, or fills no GPU.
    is_whole: bool  # Whether it holds all classes, or moves over them.
    vector: int  # Classes side by side in a thread, and how many times it has so many.
    per_thread: int
    alignment: int  # The most that may be known to divide the place of a sample.


# What a kernel is given, but for numbers: tensors, or None, and how they are seen. Strides are
# fields of their own: Triton 3.6 loses a 1 in a tuple within a tuple.
Given = collections.namedtuple(
    "Given",
    "input_ptr target_ptr class_weight_ptr sample_weight_ptr upstream_ptr divisor_ptr loss_ptr "
    "grad_input_ptr grad_target_ptr outer classes inner sample_weight_outer_stride "
    "sample_weight_inner_stride upstream_outer_stride upstream_class_stride upstream_inner_stride "
    "ignore_index",
)
# What is known of a call when its kernel is compiled. INDEX is the type of what counts within a
# block. IS_EXACT: δ is 0. IS_COUNTED: divided by what samples and weights add up to. IS_EAGER:
# samples are loaded without a wait for their labels. IS_FAST: less exact instructions will do.
# IS_EVEN: classes fill every tile. NUM_CLASSES: how many there are if they are FEW, else 0.
Plan = collections.namedtuple(
    "Plan",
    "FORM DTYPE LOWEST INDEX ALIGNMENT SAMPLES CLASSES VECTOR PER_THREAD THREADS IS_SQUARE "
    "IS_INDEX IS_EXACT IS_SMOOTH IS_REDUCED IS_COUNTED IS_SPATIAL IS_EAGER IS_FAST IS_WHOLE "
    "IS_EVEN NUM_CLASSES HAS_GRADIENT",
)
Operands = collections.namedtuple("Operands", "x t is_0 by_target in_row offsets")
# A block of samples: the offset of the first, from there those of all, and from class to class;
# which exist, are read, and count; their class, and the factors of their loss and gradient.
Block = collections.namedtuple(
    "Block",
    "base row step classes is_there is_read is_used label weight slope_weight upstream_ptr "
    "delta kept uniform",
)


class Prepared(NamedTuple):
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
) -> Prepared:
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
    return Prepared(
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


def _configure(
    form: str,
    classes: int,
    inner: int,
    dtype: torch.dtype,
    itemsize: int,
    is_index: bool,
    is_exact: bool,
    is_light: bool,
) -> Tile:
    """Fixed choices; nothing is tuned at run time, so the first call is quick.

    Sizes are those of float32, and half as much of float64 fits. `itemsize` is that of the input.
    `is_light`: there are no class weights, no smoothing, no gradient by the target.
    """
    size = dtype.itemsize // 4
    is_class = form == "logits_of_class"
    width = triton.next_power_of_2(classes) * size
    whole = 64 if inner > 1 else 2**13 if is_class else 2**12
    is_whole = width <= whole
    samples, registers, vector, alignment = 1, 128, 1, 16
    if not form.startswith("logits"):
        width = min(width, 2**10 if inner == 1 else 16)
        samples, warps, registers = 2**10 // width, 4, 255
    elif inner > 1:  # A thread holds all classes of a tile: nothing is exchanged.
        width = min(width, whole)
        samples, warps = 64, 16
        if is_class and is_whole:
            # The narrowest loads keep logits and labels in the same threads.
            alignment = min(64 // width, 4)
            samples, warps, registers = 128 * alignment, 4, 208 if is_exact else 168
            registers = registers if size == 1 else 255
        elif is_whole:
            warps = max(width // 4, 4)
        elif not is_class:
            width = 32
    elif width < 2**10:
        samples, warps = 2**10 // width, 4
        if is_class:
            samples, warps, registers = max(2**9 // width, 1), 2, 64 * size
    elif is_whole and is_class:
        warps, registers = max(width // 2**10, 2), 64 if width == 2**10 else 96
    elif is_whole:
        warps = width // 2**8
    else:
        warps, registers = 16, 64
        if is_class:  # Two rows at a time stay in cache, or one.
            width, warps = (2**13, 16) if classes * itemsize <= 2**16 else (2**14, 32)
        elif is_light and size == 1 and (is_index or itemsize == 2):
            width, warps = (2**14, 32) if is_exact else (2**13, 16)
        else:
            width, registers = 2**12, 64 if is_light and size == 1 else 128
    width //= size
    vector = 1 if inner > 1 else math.gcd(16 // itemsize, classes, width)
    threads = 1 if inner > 1 else 32 * warps
    if is_class and inner == 1 and classes <= FEW:
        threads = max(width // 16, 1)
        samples = 64 // threads
    per_thread = max(width // vector // threads, 1)
    return Tile(samples, width, warps, registers, is_whole, vector, per_thread, alignment)


@triton.jit
def _column(x):
    """A number of each sample, to be used on their classes; of one sample it is a scalar.

    A scalar has no layout, so nothing is exchanged between threads to bring it into another.
    """
    return x if len(x.shape) == 0 else x[None, :, None, None]


@triton.jit
def _sum_by_thread(tile):
    """Of what a thread holds of a sample, in its registers."""
    return tl.sum(tl.sum(tile, 3, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _max_by_thread(tile):
    return tl.max(tl.max(tile, 3, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _sum(tile):
    tile = tl.sum(tl.sum(tile, 3), 0)
    return tl.sum(tile) if tile.shape[0] == 1 else tl.sum(tile, 1)


@triton.jit
def _max(tile):
    tile = tl.max(tl.max(tile, 3), 0)
    return tl.max(tile) if tile.shape[0] == 1 else tl.max(tile, 1)


@triton.jit
def _classes(g, P: tl.constexpr):
    if P.NUM_CLASSES:
        return tl.full((), P.NUM_CLASSES, P.INDEX)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(g.classes, P.INDEX) * (1 if P.IS_SPATIAL else P.ALIGNMENT)


@triton.jit
def _inner(g, P: tl.constexpr):
    return tl.cast(g.inner, P.INDEX) * (P.ALIGNMENT if P.IS_SPATIAL else 1)


@triton.jit
def _blocks(g, P: tl.constexpr, SAMPLES: tl.constexpr):
    """How many blocks of so many samples there are."""
    if P.IS_SPATIAL:
        return g.outer * tl.cdiv(_inner(g, P), SAMPLES)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cdiv(g.outer, SAMPLES)


@triton.jit
def _is_ignored(label, ignore_index):
    is_ignored = label.to(tl.int64) == ignore_index
    if label.dtype == tl.uint64:  # Nothing is that int64 cannot hold.
        is_ignored &= label.to(tl.int64) >= 0
    return is_ignored


@triton.jit
def _samples(g, block, P: tl.constexpr, BLOCK: tl.constexpr):
    """The samples of a block.

    Their numbers in it, that of the first, their places in outer and inner, which exist, which are
    used, their class, their weight, 0 if ignored and NaN if of no class, and what they count in a
    mean: that times the weight of their class, where no class counts as the first, as in the
    formula.
    """
    i = tl.cast(0, tl.int32) if BLOCK == 1 else tl.arange(0, BLOCK)
    if P.IS_SPATIAL:
        blocks = tl.cdiv(_inner(g, P), BLOCK)
        start = block % blocks * BLOCK
        outside = tl.cast(block // blocks, tl.int64)
        inside = start + i
        first = outside * _inner(g, P) + start
        is_there = inside < _inner(g, P)
    else:
        first = tl.cast(block, tl.int64) * BLOCK
        outside = first + i
        inside = 0
        is_there = i < tl.minimum(g.outer - first, BLOCK).to(tl.int32)
        if BLOCK == 1:  # Every block has one.
            is_there = tl.full((), True, tl.int1)
    weight = tl.where(is_there, 1, 0).to(P.DTYPE)
    if g.sample_weight_ptr is not None:
        offsets = outside * g.sample_weight_outer_stride + inside * g.sample_weight_inner_stride
        weight = tl.load(g.sample_weight_ptr + offsets, mask=is_there, other=0).to(P.DTYPE)
    counted = weight
    is_used = is_there
    label = i
    if P.IS_INDEX:
        label = tl.load(g.target_ptr + first + i, mask=is_there, other=0)
        is_kept = is_there & ~_is_ignored(label, g.ignore_index)
        label = label.to(tl.int64)
        is_class = label.to(tl.uint64) < _classes(g, P).to(tl.uint64)  # And not below 0.
        is_used = is_kept & is_class
        counted = tl.where(is_kept, weight, 0)
        weight = tl.where(is_kept, tl.where(is_class, weight, float("nan")), 0)
        if g.class_weight_ptr is not None:
            pointers = g.class_weight_ptr + tl.where(is_class, label, 0)
            counted *= tl.load(pointers, mask=is_kept, other=0).to(P.DTYPE)
        label = tl.where(is_used, label, -1).to(P.INDEX)
    return i, first, outside, inside, is_there, is_used, label, weight, counted


@triton.jit
def _count(g, first, step, P: tl.constexpr):
    """Σ of the weights of samples, and of their sizes, from a block on: R labels and weights."""
    # As many bytes in registers, whatever the dtype.
    BLOCK: tl.constexpr = COUNT_BLOCK // (P.DTYPE.primitive_bitwidth // 32)  # noqa: N806
    weights = tl.full((BLOCK,), 0, P.DTYPE)
    sizes = tl.full((BLOCK,), 0, P.DTYPE)
    for block in range(first, _blocks(g, P, BLOCK), step):
        counted = _samples(g, block, P, BLOCK)[8]
        weights += counted
        sizes += tl.abs(counted)
    return tl.sum(weights), tl.sum(sizes)


@triton.jit
def _divisor(weights, sizes, g, P: tl.constexpr):
    """What `'mean'` divides by: 1 where nothing counts, which is not where weights cancel out."""
    if P.IS_SQUARE:
        weights *= _classes(g, P)
    return tl.where(sizes == 0, 1, weights)


@triton.jit
def _lifted(divisor):
    """What weights are lifted by where 1/divisor overflows, and 1 / (divisor·lift)."""
    lift = tl.where(tl.abs(divisor) < LEAST_DIVISOR, 2.0**64, 1.0).to(divisor.dtype)
    return lift, 1 / (divisor * lift)


@triton.jit
def _is_last(counter_ptr):
    """Whether what all other programs stored is there to be read; the counter is 0 again then."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _add_up(partials_ptr, P: tl.constexpr):
    """Σ of what each program stored."""
    total = tl.full((1024,), 0, P.DTYPE)
    for start in range(0, tl.num_programs(0), 1024):
        program = start + tl.arange(0, 1024)
        mask = program < tl.num_programs(0)
        total += tl.load(partials_ptr + program, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit(do_not_specialize=["counter"])
def _count_kernel(g, partials_ptr, counter_ptr, counter, P: tl.constexpr):
    """The divisor of `'mean'`: R labels and weights."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    weights, sizes = _count(g, program, programs, P)
    tl.store(partials_ptr + program, weights)
    tl.store(partials_ptr + programs + program, sizes)
    if _is_last(counter_ptr + counter):
        weights, sizes = _add_up(partials_ptr, P), _add_up(partials_ptr + programs, P)
        tl.store(g.divisor_ptr, _divisor(weights, sizes, g, P))


@triton.jit(do_not_specialize=["counter"])
def _loss_kernel(
    g, partials_ptr, counter_ptr, counter,
    factor: tl.float64, delta: tl.float64, kept: tl.float64, uniform: tl.float64, P: tl.constexpr,
):  # fmt: skip
    """Every loss: what all forms have in common. R a label, and weights if any, per sample."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    by_divisor = tl.full((), factor, P.DTYPE)
    if P.IS_COUNTED and P.HAS_GRADIENT:
        if g.divisor_ptr is None:
            # Names of their own: in Triton 3.6 none is a scalar here and a block in the loop.
            all_weights, all_sizes = _count(g, 0, 1, P)
            lift, by_divisor = _lifted(_divisor(all_weights, all_sizes, g, P))
        else:
            lift, by_divisor = _lifted(tl.load(g.divisor_ptr))

    total = tl.full((P.SAMPLES,), 0, P.DTYPE)
    weights = total
    sizes = total
    for block in range(program, _blocks(g, P, P.SAMPLES), programs):
        i, first, outside, inside, is_there, is_used, label, weight, counted = _samples(
            g, block, P, P.SAMPLES
        )
        if not P.IS_SMOOTH:  # Which has the weights of all classes, each at its place.
            weight = tl.where(weight == weight, counted, weight)  # NaN if of no class.
        if P.IS_COUNTED and P.HAS_GRADIENT:
            weight *= lift
        classes, inner = _classes(g, P), _inner(g, P)
        if P.IS_SPATIAL:
            base, row, step = first + outside * (classes - 1) * inner, i, inner
        else:
            base, row, step = first * classes, i * classes, 1
        # A product with 0 is NaN for the ignored where a factor is not finite.
        slope_weight = tl.where(is_used, weight * by_divisor, weight)
        upstream_ptr = g.upstream_ptr
        if g.upstream_ptr is not None:
            offsets = outside * g.upstream_outer_stride + inside * g.upstream_inner_stride
            upstream_ptr = g.upstream_ptr + offsets
            if not P.IS_SQUARE:
                slope_weight *= tl.load(upstream_ptr, mask=is_used, other=0).to(P.DTYPE)
        b = Block(
            base, row, step, classes, is_there, is_there if P.IS_EAGER else is_used, is_used, label,
            weight, slope_weight, upstream_ptr, tl.full((), delta, P.DTYPE),
            tl.full((), kept, P.DTYPE), tl.full((), uniform, P.DTYPE),
        )  # fmt: skip
        if P.FORM == "logits_of_class":
            loss = _softmax_of_class(g, b, P)
        elif P.FORM == "logits":
            loss = _softmax(g, b, P)
        elif P.FORM == "probabilities_of_class":
            loss = _class(g, b, P)
        else:
            loss = _elements(g, b, P)
        if P.IS_REDUCED:
            total += loss
        elif not P.IS_SQUARE:
            tl.store(g.loss_ptr + first + i, loss, mask=is_there)
        if P.IS_COUNTED and not P.HAS_GRADIENT:
            weights += counted
            sizes += tl.abs(counted)

    if P.IS_REDUCED:
        tl.store(partials_ptr + program, tl.sum(total))
        if P.IS_COUNTED and not P.HAS_GRADIENT:
            tl.store(partials_ptr + programs + program, tl.sum(weights))
            tl.store(partials_ptr + 2 * programs + program, tl.sum(sizes))
        if _is_last(counter_ptr + counter):
            loss = _add_up(partials_ptr, P)
            if P.IS_COUNTED and not P.HAS_GRADIENT:
                counted = _add_up(partials_ptr + programs, P)
                size = _add_up(partials_ptr + 2 * programs, P)
                lift, by_divisor = _lifted(_divisor(counted, size, g, P))
                loss *= lift
            tl.store(g.loss_ptr, loss * by_divisor)


@triton.jit
def _tile(b, start, P: tl.constexpr):
    """Classes of a tile, those that exist, offsets, and which is that of each sample."""
    k = tl.arange(0, P.PER_THREAD)[:, None, None, None] * (P.THREADS * P.VECTOR)
    k += tl.arange(0, P.THREADS)[:, None] * P.VECTOR + tl.arange(0, P.VECTOR)[None, :]
    in_row = k < b.classes - start
    if P.IS_EVEN:
        in_row = tl.full(k.shape, True, tl.int1)
    offsets = _column(b.row + start * b.step) + k * b.step
    return start + k, in_row, offsets, _column(b.label - start) == k


@triton.jit
def _pointers(pointer, offsets, P: tl.constexpr):
    """Pointers of a tile, the dimensions of which get threads from the last to the first."""
    pointers = pointer + offsets
    if NEEDS_ORDER and P.CLASSES > 1 and not P.IS_SPATIAL:
        # Only an order: a dimension's size bounds how much of it a thread takes at once.
        pointers = tl.max_contiguous(pointers, (1, 2, 4, 8))
    return pointers


@triton.jit
def _load(g, b, offsets, in_row, OTHER: tl.constexpr, P: tl.constexpr):
    """A tile of the input, and OTHER where none is used."""
    mask = _column(b.is_read) & in_row
    pointers = _pointers(g.input_ptr + b.base, offsets, P)
    x = tl.load(pointers, mask=mask, other=OTHER).to(P.DTYPE)
    return tl.where(_column(b.is_used), x, OTHER) if P.IS_EAGER else x


@triton.jit
def _load_of_class(g, b, P: tl.constexpr):
    offsets = b.row + b.label * b.step
    return tl.load(g.input_ptr + b.base + offsets, mask=b.is_used, other=0).to(P.DTYPE)


@triton.jit
def _targets(g, b, k, in_row, offsets, is_label, P: tl.constexpr):
    """w·((1−ε)·t + ε/C), whether that is 0 but for w, and its derivative by t."""
    mask = _column(b.is_used) & in_row
    if P.IS_INDEX:
        t = tl.where(is_label, 1, 0).to(P.DTYPE)
    else:
        pointers = _pointers(g.target_ptr + b.base, offsets, P)
        t = tl.load(pointers, mask=mask, other=0).to(P.DTYPE)
    by_target = tl.full((1, 1, 1, 1), 1, P.DTYPE)
    if P.IS_SMOOTH:
        t = tl.where(mask, t * b.kept + b.uniform, 0)
        by_target *= b.kept
    is_0 = t == 0
    if g.class_weight_ptr is not None:
        pointers = _pointers(g.class_weight_ptr, k, P)
        class_weight = tl.load(pointers, mask=in_row, other=0).to(P.DTYPE)
        t *= class_weight
        by_target *= class_weight
    return t, is_0, by_target


@triton.jit
def _store(pointer, b, offsets, in_row, value, P: tl.constexpr):
    """Nothing reads it again here, so it shall not push from the cache what is looked at again."""
    if pointer is not None:
        mask = _column(b.is_there) & in_row
        pointers = _pointers(pointer + b.base, offsets, P)
        tl.store(pointers, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _exp(x):
    """eˣ: in float32 by one instruction, which makes 0 of what would be subnormal."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _instruction(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log2(x, P: tl.constexpr):
    """log₂ x: fast, in one instruction, right to 2⁻²² of it, or, where x is near 1, to 2⁻²²."""
    return _instruction(x, "lg2") if P.IS_FAST else tl.log2(x)


@triton.jit
def _reciprocal(x, P: tl.constexpr):
    """1/x: fast, in one instruction, where a division takes eight, right to 2⁻²³ of it."""
    return _instruction(x, "rcp") if P.IS_FAST else 1 / x


@triton.jit
def _elements(g, b, P: tl.constexpr):
    """½ (y − t)², or −Σ t·log(y + δ): R y, R t if dense, W each gradient."""
    total = tl.full((P.PER_THREAD, P.SAMPLES, P.THREADS, P.VECTOR), 0, P.DTYPE)
    for start in range(0, b.classes, P.CLASSES):
        k, in_row, offsets, is_label = _tile(b, start, P)
        y = _load(g, b, offsets, in_row, 0, P)
        t, is_0, by_target = _targets(g, b, k, in_row, offsets, is_label, P)
        weight = _column(b.slope_weight)
        if P.IS_SQUARE:
            slope = y - t
            target_slope = -slope
            term = slope * (slope * 0.5)  # slope² overflows first.
            if b.upstream_ptr is not None:
                steps = k * g.upstream_class_stride
                pointers = _pointers(_column(b.upstream_ptr), steps, P)
                mask = _column(b.is_used) & in_row
                weight *= tl.load(pointers, mask=mask, other=0).to(P.DTYPE)
            slope *= weight
        else:
            guarded = y + b.delta
            if P.IS_EXACT:  # 0·log 0 is 0.
                guarded = tl.where(is_0 & (guarded == 0), 1, guarded)
            log = _log2(guarded, P) * LN_2
            slope = -t * weight  # First: their quotient by y + δ overflows where this does not.
            slope = slope * _reciprocal(guarded, P) if P.IS_FAST else slope / guarded
            target_slope = -log * by_target
            term = -t * log
        _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
        _store(g.grad_target_ptr, b, offsets, in_row, target_slope * weight, P)
        term *= _column(b.weight)
        if P.IS_SQUARE and not P.IS_REDUCED:
            _store(g.loss_ptr, b, offsets, in_row, term, P)
        else:
            total += term
    return _sum(total)


@triton.jit
def _class(g, b, P: tl.constexpr):
    """−log(y_c + δ): R an entry per sample, W the gradient."""
    guarded = tl.where(b.is_used, _load_of_class(g, b, P) + b.delta, 1)
    if g.grad_input_ptr is not None:
        slope = _column(-1 / guarded * b.slope_weight)
        rest = _column(tl.where(b.is_used, 0, b.slope_weight))
        for start in range(0, b.classes, P.CLASSES):
            _k, in_row, offsets, is_label = _tile(b, start, P)
            _store(g.grad_input_ptr, b, offsets, in_row, tl.where(is_label, slope, rest), P)
    return -tl.log(guarded) * b.weight


@triton.jit
def _normalizers(g, b, HAS_TERMS: tl.constexpr, P: tl.constexpr):
    """max x, Σ exp(x − max x), and maybe Σ t, Σ t·(x − max x), of rows longer than a tile.

    What one thread holds of a tile is reduced first, in its registers: the thread keeps one maximum
    and sums by it, and no step waits for other threads.
    """
    # Not from −inf, for −inf − (−inf) is NaN, but from what is least beside it.
    maximum = tl.full((1, P.SAMPLES, P.THREADS, 1), P.LOWEST, P.DTYPE)
    normalizer = tl.full((1, P.SAMPLES, P.THREADS, 1), 0, P.DTYPE)
    targets = tl.full((1, P.SAMPLES, P.THREADS, 1), 0, P.DTYPE)
    terms = tl.full((1, P.SAMPLES, P.THREADS, 1), 0, P.DTYPE)
    for start in range(0, b.classes, P.CLASSES):
        k, in_row, offsets, is_label = _tile(b, start, P)
        x = _load(g, b, offsets, in_row, float("-inf"), P)
        highest = tl.maximum(maximum, _max_by_thread(x))
        shifted = x - highest
        normalizer *= _exp(maximum - highest)
        normalizer += _sum_by_thread(_exp(shifted))
        if HAS_TERMS:
            t, _is_0, _by_target = _targets(g, b, k, in_row, offsets, is_label, P)
            terms += tl.where(targets == 0, 0, targets * (maximum - highest))
            terms += _sum_by_thread(tl.where(t == 0, 0, t * shifted))
            targets += _sum_by_thread(t)
        maximum = highest
    of_row = _max(maximum)
    distance = maximum - _column(of_row)
    normalizer = _sum(normalizer * _exp(distance))
    terms += tl.where(targets == 0, 0, targets * distance)
    of_row = tl.where(b.is_used, of_row, 0)
    return of_row, tl.where(b.is_used, normalizer, 1), _sum(targets), _sum(terms)


@triton.jit
def _softmax_of_class(g, b, P: tl.constexpr):
    """−log(p_c + δ) and p_c / (p_c + δ) · (pⱼ − [j = c]), p = softmax(x): R x, W the gradient.

    Rows longer than a tile are looked at twice, the second time from their end, which the cache
    still has.
    """
    # In the order that needs the fewest registers.
    if not (P.NUM_CLASSES or (P.IS_WHOLE and P.IS_SPATIAL)):
        x_c = _load_of_class(g, b, P)
    if P.IS_WHOLE:
        _k, in_row, offsets, is_label = _tile(b, 0, P)
        x = _load(g, b, offsets, in_row, float("-inf"), P)
        if P.IS_SPATIAL:
            x_c = _load_of_class(g, b, P)
        elif P.NUM_CLASSES:  # The row is in registers: no second load waits for the label.
            x_c = _sum(tl.where(is_label, x, 0))
        maximum = tl.where(b.is_used, _max(x), 0)
        exponential = _exp(x - _column(maximum))
        normalizer = tl.where(b.is_used, _sum(exponential), 1)
    else:
        maximum, normalizer, _targets, _terms = _normalizers(g, b, False, P)
    shifted = x_c - maximum
    by_normalizer = _reciprocal(normalizer, P)
    gate = b.slope_weight
    if P.IS_EXACT:
        log2 = shifted * LOG2_E - _log2(normalizer, P)
    else:
        p = _exp(shifted) * by_normalizer
        log2 = _log2(p + b.delta, P)
        gate *= p * _reciprocal(p + b.delta, P)
    if g.grad_input_ptr is not None:
        by_exponential = _column(gate * by_normalizer)
        gate = _column(gate)
        if P.IS_WHOLE:
            slope = exponential * by_exponential - tl.where(is_label, gate, 0)
            _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
        else:
            tiles = tl.cdiv(b.classes, P.CLASSES)
            for done in range(tiles):
                _k, in_row, offsets, is_label = _tile(b, (tiles - 1 - done) * P.CLASSES, P)
                x = _load(g, b, offsets, in_row, float("-inf"), P)
                exponential = _exp(x - _column(maximum))
                slope = exponential * by_exponential - tl.where(is_label, gate, 0)
                _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
    return log2 * -LN_2 * b.weight


@triton.jit
def _operands(g, b, start, P: tl.constexpr):
    """A tile of logits, what `_targets` says of it, which of its classes exist, and its offsets."""
    k, in_row, offsets, is_label = _tile(b, start, P)
    x = _load(g, b, offsets, in_row, float("-inf"), P)
    t, is_0, by_target = _targets(g, b, k, in_row, offsets, is_label, P)
    return Operands(x, t, is_0, by_target, in_row, offsets)


@triton.jit
def _guarded(b, x, maximum, log2_normalizer, P: tl.constexpr):
    """p = softmax(x), log₂(p + δ) and 1 / (p + δ)."""
    p = tl.exp2((x - _column(maximum)) * LOG2_E - _column(log2_normalizer))
    return p, _log2(p + b.delta, P), _reciprocal(p + b.delta, P)


@triton.jit
def _store_slopes(g, b, o, maximum, log2_normalizer, s, P: tl.constexpr):
    weight = _column(b.slope_weight)
    if P.IS_EXACT:
        shifted = o.x - _column(maximum)
        by_exponential = _column(s * tl.exp2(-log2_normalizer) * b.slope_weight)
        slope = _exp(shifted) * by_exponential - o.t * weight
        log2 = shifted * LOG2_E - _column(log2_normalizer)
        log2 = tl.where(o.is_0 & (log2 == float("-inf")), 0, log2)  # 0·log 0 is 0.
    else:
        p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
        slope = p * (_column(s) - o.t * reciprocal) * weight
    _store(g.grad_input_ptr, b, o.offsets, o.in_row, slope, P)
    _store(g.grad_target_ptr, b, o.offsets, o.in_row, log2 * -LN_2 * o.by_target * weight, P)


@triton.jit
def _softmax(g, b, P: tl.constexpr):
    """−Σ t·log(p + δ) and pⱼ·(S − tⱼ/(pⱼ+δ)), p = softmax(x), S = Σ tₖpₖ/(pₖ+δ).

    R x, R t if dense, W each gradient. Rows longer than a tile are looked at again, each time from
    where the last look ended, in cache: for S, which needs the normalizer, and for the gradient,
    which needs S. With δ = 0, S is Σ t, which the first look sees too.
    """
    tiles = tl.cdiv(b.classes, P.CLASSES)
    if P.IS_WHOLE:
        o = _operands(g, b, 0, P)
        maximum = tl.where(b.is_used, _max(o.x), 0)
        shifted = o.x - _column(maximum)
        log2_normalizer = _log2(tl.where(b.is_used, _sum(_exp(shifted)), 1), P)
        if P.IS_EXACT:
            s, terms = _sum(o.t), _sum(tl.where(o.is_0, 0, o.t * shifted))
        else:
            p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
            s, terms = _sum(o.t * p * reciprocal), _sum(o.t * log2)
        _store_slopes(g, b, o, maximum, log2_normalizer, s, P)
    else:
        maximum, normalizer, s, terms = _normalizers(g, b, P.IS_EXACT, P)
        log2_normalizer = _log2(normalizer, P)
        if not P.IS_EXACT:
            s_by_thread = tl.full((1, P.SAMPLES, P.THREADS, 1), 0, P.DTYPE)
            terms_by_thread = tl.full((1, P.SAMPLES, P.THREADS, 1), 0, P.DTYPE)
            for done in range(tiles):
                o = _operands(g, b, (tiles - 1 - done) * P.CLASSES, P)
                p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
                s_by_thread += _sum_by_thread(o.t * p * reciprocal)
                terms_by_thread += _sum_by_thread(o.t * log2)
            s, terms = _sum(s_by_thread), _sum(terms_by_thread)
        if P.HAS_GRADIENT:
            for done in range(tiles):
                start = (tiles - 1 - done if P.IS_EXACT else done) * P.CLASSES
                o = _operands(g, b, start, P)
                _store_slopes(g, b, o, maximum, log2_normalizer, s, P)
    if P.IS_EXACT:
        terms = terms * LOG2_E - s * log2_normalizer
    return terms * -LN_2 * b.weight


@triton.jit
def _rescale_kernel(
    gradient_ptr, grad_loss_ptr, target_ptr, numel, ignore_index, row, inner, BLOCK: tl.constexpr
):
    """R and W the gradient, but R the factor alone if it is 1, and labels if it is not finite."""
    factor = tl.load(grad_loss_ptr)
    if factor != 1:
        first_block = tl.program_id(0).to(tl.int64)
        for block in range(first_block, tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            offsets = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            gradient = tl.load(gradient_ptr + offsets, mask=offsets < numel).to(factor.dtype)
            gradient *= factor
            if target_ptr is not None:  # noqa: SIM102 - Only this one is known to the compiler.
                if not tl.abs(factor) < float("inf"):  # 0 times it is NaN.
                    samples = offsets // row * inner + offsets % inner
                    label = tl.load(target_ptr + samples, mask=offsets < numel)
                    gradient = tl.where(_is_ignored(label, ignore_index), 0, gradient)
            tl.store(gradient_ptr + offsets, gradient, mask=offsets < numel)


CAN_FAIL = True


class Launch:
    def __init__(self, call: Call) -> None:
        self.call = call

    def compute(self, *arguments: Any) -> Result:
        return compute(self.call, *arguments)

    def rescale(self, gradients: Any, grad_loss: Tensor, target: Tensor) -> Any:
        return rescale(gradients, grad_loss, self.call, target)


def prepare(call: Call, *tensors: Any) -> Launch:
    return Launch(call)
