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
# Among dimensions of equal contiguity Triton 3.6 distributes the first over threads first. Later
# versions start with the last, which the shape of a tile assumes.
NEEDS_ORDER = tl.constexpr(TorchVersion(triton.__version__) < "3.7")

# Runtime arguments: pointers (or None), sizes and strides. Strides are separate fields: Triton 3.6
# loses a 1 in a nested tuple.
KernelArgs = collections.namedtuple(
    "KernelArgs",
    "input_ptr target_ptr class_weight_ptr sample_weight_ptr upstream_ptr loss_ptr "
    "grad_input_ptr grad_target_ptr outer classes inner sample_weight_outer_stride "
    "sample_weight_inner_stride upstream_outer_stride upstream_class_stride upstream_inner_stride "
    "ignore_index",
)
# A block of samples.
# first: index of its first sample; i: sample index within the block.
# base: element offset of the block; row: offset of each sample from base.
# in_bounds: the sample exists; is_valid: it also has a label that is neither ignored nor invalid;
# load_mask: the samples whose input is loaded.
# weight, grad_weight: factors of loss and gradient; divisor_weight: its share of the divisor.
# upstream: offset of the upstream gradient; one_minus_eps: 1 − ε; eps_per_class: ε/C.
Block = collections.namedtuple(
    "Block",
    "first i base row class_stride classes in_bounds load_mask is_valid label weight grad_weight "
    "divisor_weight upstream delta one_minus_eps eps_per_class",
)
Factors = collections.namedtuple(
    "Factors", "weight_scale inv_divisor delta one_minus_eps eps_per_class"
)
# The function in losses.py that computes a loss: for dense targets, and for class indices.
BODIES = {
    "squares": ("elementwise", "elementwise"),
    "probabilities": ("elementwise", "nll"),
    "logits": ("softmax", "softmax_nll"),
}


@dataclasses.dataclass(frozen=True)
class Constants:
    """Compile-time constants of a kernel."""

    LOSS: str
    DTYPE: Any
    TILE: Tile
    INDEX: Any  # Type of offsets within a block.
    ALIGNMENT: int  # Known divisor of `classes`, or of `inner` if spatial.
    DIVISOR: str  # Computed by "host", "divisor_kernel", "each_program" or "last_program".
    PER_ELEMENT: bool
    IS_INDEX: bool
    IS_EXACT: bool  # δ = 0.
    IS_SMOOTHED: bool
    IS_REDUCED: bool
    IS_SPATIAL: bool
    IS_EVEN: bool  # The tile size divides the number of classes.
    NUM_CLASSES: int  # The number of classes if it is a constant, else 0.

    @property
    def BODY(self) -> str:  # noqa: N802
        return find_body(self.LOSS, self.IS_INDEX, self.IS_SMOOTHED)

    @property
    def LOADS_IGNORED(self) -> bool:  # noqa: N802
        """Whether the input of ignored samples is loaded too, so that no load waits for labels."""
        return self.IS_INDEX and (self.IS_SPATIAL or self.TILE.samples > 1)

    @property
    def APPROXIMATE(self) -> bool:  # noqa: N802
        """Whether approximate instructions are accurate enough."""
        # They flush subnormal numbers, which probabilities may be where no δ is added.
        may_be_subnormal = self.BODY == "elementwise" and self.IS_EXACT
        return not (IS_INTERPRETED or tl.float64 == self.DTYPE or may_be_subnormal)

    @property
    def LOWEST(self) -> float:  # noqa: N802
        return LOWEST[self.DTYPE]


def find_body(loss: str, is_index: bool, is_smoothed: bool) -> str:
    """The function that computes a loss. Smoothing makes a dense target of a class index."""
    return BODIES[loss][is_index and not is_smoothed]


@triton.jit
def _over_classes(x):
    """Broadcasts a per-sample value over classes.

    For one sample it is a scalar: that has no layout, which threads would have to convert.
    """
    return x if len(x.shape) == 0 else x[None, :, None, None]


@triton.jit
def _thread_sum(tile):
    """The sum per sample and thread, in registers."""
    return tl.sum(tl.sum(tile, 3, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _thread_max(tile):
    """The maximum per sample and thread, in registers."""
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
    if CONST.NUM_CLASSES:
        return tl.full((), CONST.NUM_CLASSES, CONST.INDEX)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(args.classes, CONST.INDEX) * (1 if CONST.IS_SPATIAL else CONST.ALIGNMENT)


@triton.jit
def _inner_size(args, CONST: tl.constexpr):
    if CONST.IS_SPATIAL:  # Decodes what `Plan._prepare` encodes.
        return tl.cast(args.inner >> 1, CONST.INDEX) * CONST.ALIGNMENT
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(args.inner, CONST.INDEX)


@triton.jit
def _blocks_per_outer(args, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    return tl.cast(tl.cdiv(_inner_size(args, CONST), SAMPLES), tl.int32)


@triton.jit
def _num_blocks(args, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    """The number of blocks of SAMPLES samples, in 32 bits: a 64-bit division is slow and spills."""
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
    """Labels, which of them are valid, and their weights in the loss and in the divisor.

    The weight in the loss is sample weight times class weight, 0 for ignored samples and NaN for
    invalid labels. In the divisor an invalid label counts like class 0, as in the formula.
    """
    label = tl.load(args.target_ptr + samples, mask=in_bounds, other=0)
    not_ignored = in_bounds & ~_is_ignored(label, args.ignore_index)
    label = label.to(tl.int64)
    is_class = label.to(tl.uint64) < classes.to(tl.uint64)  # Negative labels wrap around.
    is_valid = not_ignored & is_class
    divisor_weight = tl.where(not_ignored, sample_weight, 0)
    weight = tl.where(not_ignored, tl.where(is_class, sample_weight, float("nan")), 0)
    if args.class_weight_ptr is not None:
        pointers = args.class_weight_ptr + tl.where(is_class, label, 0)
        divisor_weight *= tl.load(pointers, mask=not_ignored, other=0).to(CONST.DTYPE)
    if not CONST.IS_SMOOTHED:  # Else `_load_targets` applies class weights, per element.
        weight = tl.where(not_ignored & ~is_class, float("nan"), divisor_weight)
    label = tl.where(is_valid, label, -1).to(CONST.INDEX)
    return label, is_valid, weight, divisor_weight


@triton.jit
def _make_block(args, factors, block, CONST: tl.constexpr, SAMPLES: tl.constexpr):
    """The block of samples with index `block`: R labels, weights and upstream gradients."""
    i = tl.cast(0, tl.int32) if SAMPLES == 1 else tl.arange(0, SAMPLES)
    classes, inner = _num_classes(args, CONST), _inner_size(args, CONST)
    if CONST.IS_SPATIAL:
        blocks = _blocks_per_outer(args, CONST, SAMPLES)
        start = tl.cast(block % blocks, CONST.INDEX) * SAMPLES
        outer_index = tl.cast(block // blocks, tl.int64)
        inner_index = start + i
        first = outer_index * inner + start
        in_bounds = inner_index < inner
        base, row, class_stride = first + outer_index * (classes - 1) * inner, i, inner
    else:
        first = tl.cast(block, tl.int64) * SAMPLES
        outer_index = first + i
        inner_index = 0
        in_bounds = i < tl.minimum(args.outer - first, SAMPLES).to(tl.int32)
        if SAMPLES == 1:
            in_bounds = tl.full((), True, tl.int1)
        base, row, class_stride = first * classes, i * classes, 1
    weight = tl.where(in_bounds, 1, 0).to(CONST.DTYPE)
    if args.sample_weight_ptr is not None:
        offsets = (
            outer_index * args.sample_weight_outer_stride
            + inner_index * args.sample_weight_inner_stride
        )
        weight = tl.load(args.sample_weight_ptr + offsets, mask=in_bounds, other=0).to(CONST.DTYPE)
    divisor_weight = weight
    is_valid = in_bounds
    label = i
    if CONST.IS_INDEX:
        label, is_valid, weight, divisor_weight = _load_labels(
            args, first + i, in_bounds, weight, classes, CONST
        )
    weight *= factors.weight_scale
    # Ignored samples keep 0: times an infinite factor it would be NaN.
    grad_weight = tl.where(is_valid, weight * factors.inv_divisor, weight)
    upstream = i  # Unused, but Triton 3.6 makes a tensor of None.
    if args.upstream_ptr is not None:
        upstream = (
            outer_index * args.upstream_outer_stride + inner_index * args.upstream_inner_stride
        )
        if not CONST.PER_ELEMENT:
            pointers = args.upstream_ptr + upstream
            grad_weight *= tl.load(pointers, mask=is_valid, other=0).to(CONST.DTYPE)
    load_mask = in_bounds if CONST.LOADS_IGNORED else is_valid
    return Block(
        first, i, base, row, class_stride, classes, in_bounds, load_mask, is_valid, label, weight,
        grad_weight, divisor_weight, upstream, factors.delta, factors.one_minus_eps,
        factors.eps_per_class,
    )  # fmt: skip


@triton.jit
def _make_tile(b, start, CONST: tl.constexpr):
    """Class indices from `start` on, which of them exist, offsets, and which are the label."""
    threads: tl.constexpr = CONST.TILE.threads
    vector: tl.constexpr = CONST.TILE.vector
    thread_start = tl.arange(0, threads)[:, None] * vector
    step = tl.arange(0, CONST.TILE.per_thread)[:, None, None, None] * (threads * vector)
    step += tl.arange(0, vector)[None, :]
    k = thread_start + step
    class_mask = k < b.classes - start
    if CONST.IS_EVEN:
        class_mask = tl.full(k.shape, True, tl.int1)
    offsets = _over_classes(b.row + start * b.class_stride) + k * b.class_stride
    # `k == label - start`, in fewer registers: `step` is a constant in each.
    is_label = _over_classes(b.label - start) - thread_start == step
    return start + k, class_mask, offsets, is_label


@triton.jit
def _pointers(pointer, offsets, CONST: tl.constexpr):
    """Pointers of a tile, whose last dimension is distributed over threads first."""
    pointers = pointer + offsets
    if NEEDS_ORDER and CONST.TILE.classes > 1 and not CONST.IS_SPATIAL:
        # Only an order: the contiguity is bounded by the size of the dimension.
        pointers = tl.max_contiguous(pointers, (1, 2, 4, 8))
    return pointers


@triton.jit
def _load_input(args, b, offsets, class_mask, OTHER: tl.constexpr, CONST: tl.constexpr):
    """A tile of the input, OTHER beyond the last class and for samples that are not valid."""
    mask = _over_classes(b.load_mask) & class_mask
    pointers = _pointers(args.input_ptr + b.base, offsets, CONST)
    x = tl.load(pointers, mask=mask, other=OTHER).to(CONST.DTYPE)
    return tl.where(_over_classes(b.is_valid), x, OTHER) if CONST.LOADS_IGNORED else x


@triton.jit
def _load_target_class(args, b, CONST: tl.constexpr):
    """The input at the label of each sample, 0 for samples that are not valid."""
    offsets = b.row + b.label * b.class_stride
    return tl.load(args.input_ptr + b.base + offsets, mask=b.is_valid, other=0).to(CONST.DTYPE)


@triton.jit
def _load_targets(args, b, k, class_mask, offsets, is_label, CONST: tl.constexpr):
    """w·t′ with t′ = (1 − ε)·t + ε/C, whether t′ = 0, and the derivative (1 − ε)·w.

    t is a tile of the target, one-hot for labels, and w are class weights.
    """
    mask = _over_classes(b.is_valid) & class_mask
    if CONST.IS_INDEX:
        t = tl.where(is_label, 1, 0).to(CONST.DTYPE)
    else:
        pointers = _pointers(args.target_ptr + b.base, offsets, CONST)
        t = tl.load(pointers, mask=mask, other=0).to(CONST.DTYPE)
    dtarget = tl.full((1, 1, 1, 1), 1, CONST.DTYPE)
    if CONST.IS_SMOOTHED:
        t = tl.where(mask, t * b.one_minus_eps + b.eps_per_class, 0)
        dtarget *= b.one_minus_eps
    is_zero = t == 0
    if args.class_weight_ptr is not None:
        pointers = _pointers(args.class_weight_ptr, k, CONST)
        class_weight = tl.load(pointers, mask=class_mask, other=0).to(CONST.DTYPE)
        t *= class_weight
        dtarget *= class_weight
    return t, is_zero, dtarget


@triton.jit
def _store(pointer, b, offsets, class_mask, value, CONST: tl.constexpr):
    """Stores a tile, to be evicted first: gradients are not read again, inputs are."""
    if pointer is not None:
        mask = _over_classes(b.in_bounds) & class_mask
        pointers = _pointers(pointer + b.base, offsets, CONST)
        tl.store(pointers, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _exp(x):
    """eˣ, in float32 by one instruction, which flushes subnormal results to 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _approx(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log2(x, CONST: tl.constexpr):
    """log₂ x. Approximate: a relative error of 2⁻²², near x = 1 an absolute one."""
    return _approx(x, "lg2") if CONST.APPROXIMATE else tl.log2(x)


@triton.jit
def _reciprocal(x, CONST: tl.constexpr):
    """1/x. Approximate: a relative error of 2⁻²³, in one instruction; a division takes eight."""
    return _approx(x, "rcp") if CONST.APPROXIMATE else 1 / x
