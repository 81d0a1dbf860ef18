"""Blocks of samples, and tiles of classes: what is known of them, loads, stores, reductions."""

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
# Among dimensions of equal contiguity Triton 3.6 gives threads to the first one first. Later
# versions begin with the last, which the shape of a tile is made for.
NEEDS_ORDER = tl.constexpr(TorchVersion(triton.__version__) < "3.7")

# Runtime arguments: pointers (or None), sizes and strides. Strides are fields of their own: Triton
# 3.6 loses a 1 in a tuple within a tuple.
Given = collections.namedtuple(
    "Given",
    "input_ptr target_ptr class_weight_ptr sample_weight_ptr upstream_ptr loss_ptr "
    "grad_input_ptr grad_target_ptr outer classes inner sample_weight_outer_stride "
    "sample_weight_inner_stride upstream_outer_stride upstream_class_stride upstream_inner_stride "
    "ignore_index",
)
# A block of samples.
# first: index of its first sample; i: sample index within the block.
# base: element offset of the block; row: each sample's offset from base; step: stride of classes.
# is_there: the sample exists; is_read: load mask; is_used: not ignored, and its label is valid.
# weight, slope_weight: factors of loss and gradient; counted: its part of the divisor of a mean.
# upstream: offset of the upstream gradient; delta, kept, uniform: δ, 1 − ε, ε/C.
Block = collections.namedtuple(
    "Block",
    "first i base row step classes is_there is_read is_used label weight slope_weight counted "
    "upstream delta kept uniform",
)
# Factor of sample weights, 1/divisor, δ, 1 − ε and ε/C.
Factors = collections.namedtuple("Factors", "lift by_divisor delta kept uniform")
# The function in losses.py that computes a loss: for dense targets, and for class indices.
BODIES = {
    "squares": ("elements", "elements"),
    "probabilities": ("elements", "element_of_class"),
    "logits": ("softmax", "softmax_of_class"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile-time constants of a kernel."""

    LOSS: str
    DTYPE: Any
    TILE: Tile
    INDEX: Any  # Type of offsets within a block.
    ALIGNMENT: int  # Known divisor of `classes`, or of `inner` if spatial.
    DIVISOR: (
        str  # Who computes that of a mean: "host", "count_kernel", "each_program", "last_program".
    )
    PER_ELEMENT: bool
    IS_INDEX: bool
    IS_EXACT: bool  # δ is 0.
    IS_SMOOTH: bool
    IS_REDUCED: bool
    IS_SPATIAL: bool
    IS_EVEN: bool  # Classes fill every tile.
    NUM_CLASSES: int  # The number of classes if it is a constant, else 0.

    @property
    def BODY(self) -> str:  # noqa: N802
        return find_body(self.LOSS, self.IS_INDEX, self.IS_SMOOTH)

    @property
    def IS_EAGER(self) -> bool:  # noqa: N802
        """Whether loads of the input do not wait for the labels."""
        return self.IS_INDEX and (self.IS_SPATIAL or self.TILE.samples > 1)

    @property
    def IS_FAST(self) -> bool:  # noqa: N802
        """Whether approximate instructions are accurate enough."""
        # Probabilities can be too small for them where no δ is added.
        is_tiny = self.BODY == "elements" and self.IS_EXACT
        return not (IS_INTERPRETED or tl.float64 == self.DTYPE or is_tiny)

    @property
    def LOWEST(self) -> float:  # noqa: N802
        return LOWEST[self.DTYPE]


def find_body(loss: str, is_index: bool, is_smooth: bool) -> str:
    """A smoothed class is one of many."""
    return BODIES[loss][is_index and not is_smooth]


@triton.jit
def _column(x):
    """Broadcasts a per-sample value over classes (a scalar for one sample).

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
    if P.IS_SPATIAL:  # Decodes the size that `Launch._plan` encodes.
        return tl.cast(g.inner >> 1, P.INDEX) * P.ALIGNMENT
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(g.inner, P.INDEX)


@triton.jit
def _blocks(g, P: tl.constexpr, SAMPLES: tl.constexpr):
    """The number of blocks of SAMPLES samples, in 32 bits: a 64-bit division is slow and spills."""
    if P.IS_SPATIAL:
        return tl.cast(g.outer, tl.int32) * tl.cast(tl.cdiv(_inner(g, P), SAMPLES), tl.int32)
    else:  # noqa: RET505 - Only one branch is compiled.
        return tl.cast(tl.cdiv(g.outer, SAMPLES), tl.int32)


@triton.jit
def _is_ignored(label, ignore_index):
    is_ignored = label.to(tl.int64) == ignore_index
    if label.dtype == tl.uint64:  # Nothing is that int64 cannot hold.
        is_ignored &= label.to(tl.int64) >= 0
    return is_ignored


@triton.jit
def _block(g, f, block, P: tl.constexpr, SAMPLES: tl.constexpr):
    """A block of samples.

    `weight` is sample weight times class weight, 0 for ignored samples and NaN for invalid labels.
    In the divisor an invalid label counts like class 0, as in the formula.
    """
    i = tl.cast(0, tl.int32) if SAMPLES == 1 else tl.arange(0, SAMPLES)
    classes, inner = _classes(g, P), _inner(g, P)
    if P.IS_SPATIAL:
        blocks = tl.cast(tl.cdiv(inner, SAMPLES), tl.int32)
        start = tl.cast(block % blocks, P.INDEX) * SAMPLES
        outside = tl.cast(block // blocks, tl.int64)
        inside = start + i
        first = outside * inner + start
        is_there = inside < inner
        base, row, step = first + outside * (classes - 1) * inner, i, inner
    else:
        first = tl.cast(block, tl.int64) * SAMPLES
        outside = first + i
        inside = 0
        is_there = i < tl.minimum(g.outer - first, SAMPLES).to(tl.int32)
        if SAMPLES == 1:  # Every block has one.
            is_there = tl.full((), True, tl.int1)
        base, row, step = first * classes, i * classes, 1
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
        is_class = label.to(tl.uint64) < classes.to(tl.uint64)  # And not below 0.
        is_used = is_kept & is_class
        counted = tl.where(is_kept, weight, 0)
        weight = tl.where(is_kept, tl.where(is_class, weight, float("nan")), 0)
        if g.class_weight_ptr is not None:
            pointers = g.class_weight_ptr + tl.where(is_class, label, 0)
            counted *= tl.load(pointers, mask=is_kept, other=0).to(P.DTYPE)
        if not P.IS_SMOOTH:  # With smoothing, `_targets` applies class weights per element.
            weight = tl.where(is_kept & ~is_class, float("nan"), counted)
        label = tl.where(is_used, label, -1).to(P.INDEX)
    weight *= f.lift
    # A product with 0 is NaN for the ignored where a factor is not finite.
    slope_weight = tl.where(is_used, weight * f.by_divisor, weight)
    upstream = i  # No None, which Triton 3.6 makes a tensor of.
    if g.upstream_ptr is not None:
        upstream = outside * g.upstream_outer_stride + inside * g.upstream_inner_stride
        if not P.PER_ELEMENT:
            pointers = g.upstream_ptr + upstream
            slope_weight *= tl.load(pointers, mask=is_used, other=0).to(P.DTYPE)
    return Block(
        first, i, base, row, step, classes, is_there, is_there if P.IS_EAGER else is_used, is_used,
        label, weight, slope_weight, counted, upstream, f.delta, f.kept, f.uniform,
    )  # fmt: skip


@triton.jit
def _tile(b, start, P: tl.constexpr):
    """Classes of a tile, those that exist, offsets, and which is that of each sample."""
    k = tl.arange(0, P.TILE.threads)[:, None] * P.TILE.vector + tl.arange(0, P.TILE.vector)[None, :]
    k += tl.arange(0, P.TILE.per_thread)[:, None, None, None] * (P.TILE.threads * P.TILE.vector)
    in_row = k < b.classes - start
    if P.IS_EVEN:
        in_row = tl.full(k.shape, True, tl.int1)
    offsets = _column(b.row + start * b.step) + k * b.step
    return start + k, in_row, offsets, _column(b.label - start) == k


@triton.jit
def _pointers(pointer, offsets, P: tl.constexpr):
    """Pointers of a tile, the dimensions of which get threads from the last to the first."""
    pointers = pointer + offsets
    if NEEDS_ORDER and P.TILE.classes > 1 and not P.IS_SPATIAL:
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
    """The weighted smoothed target, whether the unweighted one is 0, and the derivative by t."""
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
    """Streaming store: gradients are not read again, inputs are."""
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
