"""Tile sizes."""

import math
from typing import NamedTuple

import torch
import triton

# The most programs of a launch, and so its most partial sums. That many fill any GPU several times.
MAX_PROGRAMS = 2**12
# Up to this many classes are a compile-time constant.
MAX_CONSTANT_CLASSES = 32


class Tile(NamedTuple):
    """The part of the input that a program holds at a time.

    Class `(v · row_threads + t) · vector_size + e` of the tile has the index (v, sample, t, e).
    """

    samples: int
    classes: int
    warps: int
    registers: int  # Limit per thread; with ptxas's default, kernels spill or occupancy drops.
    max_programs: int  # Per launch.
    is_whole: bool  # For softmaxes: whether it holds all classes. If not, they loop over tiles.
    vector_size: int  # Neighbouring classes in a vector; 1 if inner > 1.
    vectors: int  # If inner = 1, the vectors of a sample in each thread; else as `classes`.
    max_alignment: int  # Limit of `Constants.ALIGNMENT`, and so of the length of a vector load.

    @property
    def row_threads(self) -> int:
        """If inner = 1, the threads that share a sample; else 1, however many share it."""
        return self.classes // self.vector_size // self.vectors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tile as a tensor."""
        return self.vectors, self.samples, self.row_threads, self.vector_size


# (Width of the tile in 4-byte words, samples, warps, registers per thread.)
TileSpec = tuple[int, int, int, int]


def configure(
    body: str,
    classes: int,
    inner: int,
    dtype: torch.dtype,
    itemsize: int,
    *,
    has_delta: bool,
    is_plain: bool,
) -> Tile:
    """The tile of a call, by fixed rules: tuning at run time would slow the first call.

    `dtype` is that of the computation, `itemsize` that of the input. `is_plain`: no class weights,
    smoothing or target gradient.
    """
    class_words = dtype.itemsize // 4  # 4-byte words per class.
    padded = triton.next_power_of_2(classes)
    row_words = padded * class_words
    is_spatial, is_odd = inner > 1, classes % 2 == 1
    is_softmax_nll = body == "softmax_nll"
    is_whole = row_words <= (64 if is_spatial else 2**13 if is_softmax_nll else 2**12)
    # A thread holds all classes of two samples.
    fits_thread = is_softmax_nll and is_spatial and row_words <= 32
    is_short = is_softmax_nll and not is_spatial and classes <= MAX_CONSTANT_CLASSES
    threads_per_short_row = max(padded // 16, 1)  # At most 16 classes in each.
    # The second pass over a row finds it in the cache.
    is_cached = is_softmax_nll and not (is_spatial or is_whole) and classes * itemsize <= 2**17
    if not body.startswith("softmax"):
        width_words = min(row_words, 16 if is_spatial else 2**10)
        spec = width_words, 2**10 // width_words, 4, 255
    elif is_spatial:
        spec = _spatial_spec(row_words, class_words, is_softmax_nll, has_delta)
    elif is_short:  # Two warps have 64 threads.
        spec = row_words, 64 // threads_per_short_row, 2, 64 * class_words
    elif is_whole:
        spec = _row_spec(row_words, class_words, is_softmax_nll)
    elif is_cached:
        spec = _cached_spec(class_words, itemsize, is_odd)
    else:
        # float64, class weights, smoothing, target gradients and scalar 16-bit loads need more.
        needs_few_registers = is_plain and class_words == 1 and not (is_odd and itemsize == 2)
        spec = _part_spec(is_softmax_nll, has_delta, needs_few_registers, itemsize == 2)
    width_words, samples, warps, registers = spec
    tile_classes = width_words // class_words
    vector_size = 1 if is_spatial else math.gcd(16 // itemsize, classes, tile_classes)
    max_row_threads = 1 if is_spatial else threads_per_short_row if is_short else 32 * warps
    # If a row has fewer vectors than `max_row_threads`, each thread has one.
    vectors = max(tile_classes // vector_size // max_row_threads, 1)
    # Rows loaded one class at a time were fastest on an H200 with four programs per multiprocessor.
    max_programs = 4 * 132 if is_cached and is_odd else MAX_PROGRAMS
    # If inner > 1, vector loads run along samples. Where a thread holds all classes of two samples,
    # loads of four would give four samples to half of the threads, and Triton would then split
    # their classes between these threads and the other half.
    max_alignment = 2 if fits_thread else 16
    return Tile(
        samples, tile_classes, warps, registers, max_programs, is_whole, vector_size, vectors,
        max_alignment,
    )  # fmt: skip


def _spatial_spec(
    row_words: int, class_words: int, is_softmax_nll: bool, has_delta: bool
) -> TileSpec:
    """For contiguous samples, with strided classes."""
    if is_softmax_nll and row_words <= 32:
        # A thread holds all classes of two samples, and exchanges nothing.
        return row_words, 256, 4, 255 if class_words == 2 else 168 if has_delta else 208
    if is_softmax_nll and row_words <= 64:
        return row_words, 128, 4, 208 if class_words == 1 else 255
    if is_softmax_nll:
        return 64, 64, 16, 128
    if row_words <= 64:
        return row_words, 64, max(row_words // 4, 4), 128
    return 32, 64, 16, 128


def _row_spec(row_words: int, class_words: int, is_softmax_nll: bool) -> TileSpec:
    """For whole rows of contiguous classes: several in a tile, or one."""
    if is_softmax_nll and row_words < 2**10:
        return row_words, max(2**9 // row_words, 1), 2, 64 * class_words
    if row_words < 2**10:
        return row_words, 2**10 // row_words, 4, 128
    if is_softmax_nll and row_words == 2**10:
        return row_words, 1, 2, 64
    if is_softmax_nll:
        return row_words, 1, row_words // 2**10, 96
    return row_words, 1, row_words // 2**8, 128


def _cached_spec(class_words: int, itemsize: int, is_odd: bool) -> TileSpec:
    """For parts of rows that stay in the cache: 16 KiB of the input."""
    width_words = min(2**14 // itemsize * class_words, 2**13)
    # An odd number of classes is loaded one at a time, which needs many loads in flight.
    return (width_words, 1, 8, 128) if is_odd else (width_words, 1, 16, 64)


def _part_spec(
    is_softmax_nll: bool, has_delta: bool, needs_few_registers: bool, is_16_bit: bool
) -> TileSpec:
    """For parts of other rows: the fewer registers an element needs, the larger the tile."""
    is_light = needs_few_registers and is_16_bit
    if is_softmax_nll or (is_light and not has_delta):
        return 2**14, 1, 32, 64
    if is_light:
        return 2**13, 1, 16, 64
    return 2**12, 1, 16, 64 if needs_few_registers else 128
