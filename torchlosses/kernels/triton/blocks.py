"""Blocks of samples and tiles of classes: arguments, loads, stores, reductions, fast functions."""

import collections
import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.torch_version import TorchVersion

from torchlosses.kernels.triton.tiles import Tile

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LOWEST = {
    tl.float32: torch.finfo(torch.float32).min,
    tl.float64: torch.finfo(torch.float64).min,
}
IS_INTERPRETED = triton.knobs.runtime.interpret
# When contiguity ties, Triton 3.6 makes the first dimension fastest-varying across threads; later
# versions the last, which the shape of a tile assumes.
NEEDS_ORDER_HINT = tl.constexpr(TorchVersion(triton.__version__) < "3.7")

# Runtime arguments: pointers (or None), sizes and strides. Each stride is a field of its own:
# Triton 3.6 drops an int equal to 1 from a nested tuple.
KernelArgs = collections.namedtuple(
    "KernelArgs",
    "input_ptr target_ptr class_weight_ptr sample_weight_ptr upstream_ptr loss_ptr "
    "grad_input_ptr grad_target_ptr outer classes inner sample_weight_outer_stride "
    "sample_weight_inner_stride upstream_outer_stride upstream_class_stride upstream_inner_stride "
    "ignore_index",
)
# A block of samples.
# first: index of its first sample; i: sample index within the block.
# base: element offset of the block; sample_offset: offset of each sample from base.
# in_bounds: the sample exists; is_valid: and its label, if any, is neither ignored nor invalid;
# load_mask: the samples whose input is loaded.
# weight, grad_scale: factors of a sample's loss and gradient; divisor_weight: its share of the
# divisor; upstream_offset: offset of its upstream gradient.
Block = collections.namedtuple(
    "Block",
    "first i base sample_offset class_stride classes in_bounds load_mask is_valid label weight "
    "grad_scale divisor_weight upstream_offset delta one_minus_eps eps_per_class",
)
# Values shared by all blocks, in the dtype of the computation.
# weight_scale: factor of all weights, see `_scaled_inverse`; inv_divisor: 1 / (scaled divisor).
# one_minus_eps: 1 − ε; eps_per_class: ε/C.
Scalars = collections.namedtuple(
    "Scalars", "weight_scale inv_divisor delta one_minus_eps eps_per_class"
)


@dataclasses.dataclass(frozen=True)
class Constants:
    """Compile-time constants of a kernel."""

    LOSS: str
    BODY: str  # The function in losses.py that computes the loss.
    DTYPE: Any
    TILE: Tile
    INDEX: Any  # Type of offsets within a block.
    ALIGNMENT: int  # Known divisor of `classes`, or of `inner` if spatial.
    # What computes the divisor: "host", "divisor_kernel", "each_program" or "last_program".
    DIVISOR_SOURCE: str
    PER_ELEMENT: bool  # Each element has a loss, not each sample.
    IS_INDEX: bool
    HAS_DELTA: bool  # δ ≠ 0.
    IS_SMOOTHED: bool  # ε ≠ 0.
    IS_REDUCED: bool
    IS_SPATIAL: bool  # inner > 1.
    IS_EVEN: bool  # The tile size divides the number of classes.
    NUM_CLASSES: int  # The number of classes if it is a constant, else 0.

    @property
    def LOADS_IGNORED(self) -> bool:  # noqa: N802
        """Whether the input of ignored samples is loaded too, so that no load waits for labels."""
        return self.IS_INDEX and (self.IS_SPATIAL or self.TILE.samples > 1)

    @property
    def APPROXIMATE(self) -> bool:  # noqa: N802
        """Whether approximate instructions are accurate enough."""
        # They flush subnormal numbers to 0. A probability may be subnormal, if no δ is added to it.
        may_be_subnormal = self.BODY == "elementwise" and not self.HAS_DELTA
        return not (IS_INTERPRETED or tl.float64 == self.DTYPE or may_be_subnormal)

    @property
    def LOWEST(self) -> float:  # noqa: N802
        return LOWEST[self.DTYPE]


@triton.jit
def _broadcast(x):
    """Broadcasts a per-sample value over the classes of a tile.

    For one sample it is a scalar, which needs no layout conversion.
    """
    return x if len(x.shape) == 0 else x[None, :, None, None]


@triton.jit
def _thread_sum(tile):
    """The sum over the first and last dimension: inside a thread, if inner = 1."""
    return tl.sum(tl.sum(tile, 3, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _thread_max(tile):
    """The maximum over the first and last dimension: inside a thread, if inner = 1."""
    return tl.max(tl.max(tile, 3, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _class_sum(tile):
    """The sum over classes: per sample, or a scalar for one."""
    tile = tl.sum(tl.sum(tile, 3), 0)
    return tl.sum(tile) if tile.shape[0] == 1 else tl.sum(tile, 1)


@triton.jit
def _class_max(tile):
    """The maximum over classes: per sample, or a scalar for one."""
    tile = tl.max(tl.max(tile, 3), 0)
    return tl.max(tile) if tile.shape[0] == 1 else tl.max(tile, 1)


@triton.jit
def _num_classes(args, CONST: tl.constexpr):
    """The number of classes, which `Plan._make_pass` may encode."""
    if CONST.NUM_CLASSES:
        return tl.full((), CONST.NUM_CLASSES, CONST.INDEX)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(args.classes, CONST.INDEX) * (1 if CONST.IS_SPATIAL else CONST.ALIGNMENT)


@triton.jit
def _inner_size(args, CONST: tl.constexpr):
    """The size of the inner dimension, which `Plan._make_pass` may encode."""
    if CONST.IS_SPATIAL:
        return tl.cast(args.inner >> 1, CONST.INDEX) * CONST.ALIGNMENT
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(args.inner, CONST.INDEX)


@triton.jit
def _blocks_per_outer(args, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    """The number of blocks of SAMPLES samples in one outer index."""
    return tl.cast(tl.cdiv(_inner_size(args, CONST), SAMPLES), tl.int32)


@triton.jit
def _num_blocks(args, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    """The number of blocks of SAMPLES samples, in 32 bits, so that their indices are too.

    `_make_block` divides those, and a 64-bit division is slow and spills.
    """
    if CONST.IS_SPATIAL:
        return tl.cast(args.outer, tl.int32) * _blocks_per_outer(args, CONST, SAMPLES)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(tl.cdiv(args.outer, SAMPLES), tl.int32)


@triton.jit
def _is_ignored(label, ignore_index):
    is_ignored = label.to(tl.int64) == ignore_index
    if label.dtype == tl.uint64:  # Labels from 2⁶³ on wrap around, and are never ignored.
        is_ignored &= label.to(tl.int64) >= 0
    return is_ignored


@triton.jit
def _load_labels(args, samples, in_bounds, sample_weight, classes, CONST: tl.constexpr):
    """Labels, a mask of valid ones, and their weights in the loss and in the divisor.

    The weight in the loss is the sample weight, times the class weight unless smoothed, 0 for
    ignored samples and NaN for invalid labels. In the divisor an invalid label counts like class 0,
    as in the formula.
    """
    label = tl.load(args.target_ptr + samples, mask=in_bounds, other=0)
    not_ignored = in_bounds & ~_is_ignored(label, args.ignore_index)
    label = label.to(tl.int64)
    is_class = label.to(tl.uint64) < classes.to(tl.uint64)  # Negative labels wrap around.
    is_valid = not_ignored & is_class
    divisor_weight = tl.where(not_ignored, sample_weight, 0)
    if args.class_weight_ptr is not None:
        pointers = args.class_weight_ptr + tl.where(is_class, label, 0)
        divisor_weight *= tl.load(pointers, mask=not_ignored, other=0).to(CONST.DTYPE)
    weight = divisor_weight
    if CONST.IS_SMOOTHED:  # `_load_targets` applies class weights, per element.
        weight = tl.where(not_ignored, sample_weight, 0)
    weight = tl.where(not_ignored & ~is_class, float("nan"), weight)
    label = tl.where(is_valid, label, -1).to(CONST.INDEX)
    return label, is_valid, weight, divisor_weight


@triton.jit
def _make_block(args, scalars, block, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    """The block of samples with index `block`: R labels, weights and upstream gradients."""
    i = tl.cast(0, tl.int32) if SAMPLES == 1 else tl.arange(0, SAMPLES)
    classes, inner = _num_classes(args, CONST), _inner_size(args, CONST)
    if CONST.IS_SPATIAL:
        blocks_per_outer = _blocks_per_outer(args, CONST, SAMPLES)
        start = tl.cast(block % blocks_per_outer, CONST.INDEX) * SAMPLES
        outer_index = tl.cast(block // blocks_per_outer, tl.int64)
        inner_index = start + i
        first = outer_index * inner + start
        in_bounds = inner_index < inner
        base = outer_index * classes * inner + start
        sample_offset, class_stride = i, inner
    else:
        first = tl.cast(block, tl.int64) * SAMPLES
        outer_index = first + i
        inner_index = 0
        in_bounds = i < tl.minimum(args.outer - first, SAMPLES).to(tl.int32)
        if SAMPLES == 1:
            in_bounds = tl.full((), True, tl.int1)
        base, sample_offset, class_stride = first * classes, i * classes, 1
    if args.sample_weight_ptr is None:
        weight = tl.where(in_bounds, 1, 0).to(CONST.DTYPE)
    else:
        offsets = (
            outer_index * args.sample_weight_outer_stride
            + inner_index * args.sample_weight_inner_stride
        )
        weight = tl.load(args.sample_weight_ptr + offsets, mask=in_bounds, other=0).to(CONST.DTYPE)
    divisor_weight = weight
    is_valid = in_bounds
    label = i  # Unused for dense targets.
    if CONST.IS_INDEX:
        label, is_valid, weight, divisor_weight = _load_labels(
            args, first + i, in_bounds, weight, classes, CONST
        )
    weight *= scalars.weight_scale
    # Ignored samples keep 0: times an infinite factor it would be NaN.
    grad_scale = tl.where(is_valid, weight * scalars.inv_divisor, weight)
    upstream_offset = i  # Unused, but Triton 3.6 fails to convert None to a tensor.
    if args.upstream_ptr is not None:
        upstream_offset = (
            outer_index * args.upstream_outer_stride + inner_index * args.upstream_inner_stride
        )
        if not CONST.PER_ELEMENT:
            pointers = args.upstream_ptr + upstream_offset
            grad_scale *= tl.load(pointers, mask=is_valid, other=0).to(CONST.DTYPE)
    load_mask = in_bounds if CONST.LOADS_IGNORED else is_valid
    return Block(
        first, i, base, sample_offset, class_stride, classes, in_bounds, load_mask, is_valid, label,
        weight, grad_scale, divisor_weight, upstream_offset, scalars.delta, scalars.one_minus_eps,
        scalars.eps_per_class,
    )  # fmt: skip


@triton.jit
def _make_tile(b, start, CONST: tl.constexpr):
    """Class indices from `start` on, a mask of those that exist, offsets, a mask of the label."""
    row_threads: tl.constexpr = CONST.TILE.row_threads
    vector_size: tl.constexpr = CONST.TILE.vector_size
    # A class of the tile is `class_of_thread + class_of_register`. The second is known when the
    # kernel is compiled, for each register.
    class_of_thread = tl.arange(0, row_threads)[:, None] * vector_size
    vector = tl.arange(0, CONST.TILE.vectors)[:, None, None, None]
    class_of_register = vector * (row_threads * vector_size) + tl.arange(0, vector_size)[None, :]
    class_in_tile = class_of_thread + class_of_register
    class_mask = class_in_tile < b.classes - start
    if CONST.IS_EVEN:
        class_mask = tl.full(class_in_tile.shape, True, tl.int1)
    first_offset = _broadcast(b.sample_offset + start * b.class_stride)
    offsets = first_offset + class_in_tile * b.class_stride
    # `class_in_tile == label - start`, in fewer registers.
    is_label = _broadcast(b.label - start) - class_of_thread == class_of_register
    return start + class_in_tile, class_mask, offsets, is_label


@triton.jit
def _pointers(pointer, offsets, CONST: tl.constexpr):
    """Pointers of a tile of contiguous classes, which vary fastest across threads."""
    pointers = pointer + offsets
    if NEEDS_ORDER_HINT and CONST.TILE.classes > 1 and not CONST.IS_SPATIAL:
        # Claims runs of 1, 2, 4 and 8 contiguous elements along the four dimensions. Triton caps a
        # run at the dimension's size, so the 8 becomes `vector_size`, which is correct. The 2 and
        # 4 are not; they only make Triton order the dimensions, the last fastest, and no load is
        # vectorised along those dimensions.
        pointers = tl.max_contiguous(pointers, (1, 2, 4, 8))
    return pointers


@triton.jit
def _load_input(args, b, offsets, class_mask, OTHER: tl.constexpr, CONST: tl.constexpr):
    """A tile of the input, OTHER beyond the last class and for samples that are not valid."""
    mask = _broadcast(b.load_mask) & class_mask
    pointers = _pointers(args.input_ptr + b.base, offsets, CONST)
    x = tl.load(pointers, mask=mask, other=OTHER).to(CONST.DTYPE)
    return tl.where(_broadcast(b.is_valid), x, OTHER) if CONST.LOADS_IGNORED else x


@triton.jit
def _load_input_at_label(args, b, CONST: tl.constexpr):
    """The input at the label of each sample, 0 for samples that are not valid."""
    offsets = b.sample_offset + b.label * b.class_stride
    return tl.load(args.input_ptr + b.base + offsets, mask=b.is_valid, other=0).to(CONST.DTYPE)


@triton.jit
def _load_targets(args, b, k, class_mask, offsets, is_label, CONST: tl.constexpr):
    """w·t′ with t′ = (1 − ε)·t + ε/C, whether t′ = 0, and t_factor = ∂(w·t′)/∂t = (1 − ε)·w.

    t is a tile of the target, one-hot for labels, and w are class weights.
    """
    mask = _broadcast(b.is_valid) & class_mask
    if CONST.IS_INDEX:
        t = tl.where(is_label, 1, 0).to(CONST.DTYPE)
    else:
        pointers = _pointers(args.target_ptr + b.base, offsets, CONST)
        t = tl.load(pointers, mask=mask, other=0).to(CONST.DTYPE)
    t_factor = tl.full((1, 1, 1, 1), 1, CONST.DTYPE)
    if CONST.IS_SMOOTHED:
        t = tl.where(mask, t * b.one_minus_eps + b.eps_per_class, 0)
        t_factor *= b.one_minus_eps
    is_zero = t == 0
    if args.class_weight_ptr is not None:
        pointers = _pointers(args.class_weight_ptr, k, CONST)
        class_weight = tl.load(pointers, mask=class_mask, other=0).to(CONST.DTYPE)
        t *= class_weight
        t_factor *= class_weight
    return t, is_zero, t_factor


@triton.jit
def _store(pointer, b, offsets, class_mask, value, CONST: tl.constexpr):
    """Stores a tile, to be evicted first: gradients are not read again, inputs are."""
    if pointer is not None:
        mask = _broadcast(b.in_bounds) & class_mask
        pointers = _pointers(pointer + b.base, offsets, CONST)
        tl.store(pointers, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _exp(x):
    """eˣ, in float32 by ex2, which flushes subnormal results to 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _approx(x, NAME: tl.constexpr):
    """The approximate PTX instruction NAME, lg2 or rcp."""
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log2(x, CONST: tl.constexpr):
    """log₂ x. If approximate, with an error of 2⁻²²: absolute near x = 1, relative elsewhere."""
    return _approx(x, "lg2") if CONST.APPROXIMATE else tl.log2(x)


@triton.jit
def _reciprocal(x, CONST: tl.constexpr):
    """1/x. Approximate: a relative error of 2⁻²³, in one instruction; a division takes eight."""
    return _approx(x, "rcp") if CONST.APPROXIMATE else 1 / x
