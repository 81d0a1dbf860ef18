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
    """The part of the input that a program holds at a time."""

    samples: int
    classes: int
    warps: int
    registers: int  # Limit per thread; with ptxas's default, kernels spill or occupancy drops.
    max_programs: int  # Per launch.
    is_whole: bool  # Whether it holds all classes; if not, softmaxes loop over them.
    vector_size: int  # Contiguous classes per vector.
    vectors: int  # Size of the tile along vectors.
    max_alignment: int  # Limit of `Constants.ALIGNMENT`.

    @property
    def threads(self) -> int:
        """Size of the tile along threads."""
        return self.classes // self.vector_size // self.vectors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tile as a tensor."""
        return self.vectors, self.samples, self.threads, self.vector_size


# (Width of the tile in 4-byte words, samples, warps, registers per thread.)
TileSpec = tuple[int, int, int, int]


def configure(
    body: str,
    classes: int,
    inner: int,
    dtype: torch.dtype,
    itemsize: int,
    is_index: bool,
    has_delta: bool,
    is_plain: bool,
) -> Tile:
    """The tile of a call, by fixed rules: tuning at run time would slow the first call.

    `itemsize` is that of the input. `is_plain`: no class weights, smoothing or target gradient.
    """
    size = dtype.itemsize // 4  # 4-byte words per class.
    padded = triton.next_power_of_2(classes)
    w = padded * size  # Words per sample.
    is_spatial, is_odd, is_nll = inner > 1, classes % 2 == 1, body == "softmax_nll"
    is_whole = w <= (64 if is_spatial else 2**13 if is_nll else 2**12)
    fits_thread = is_nll and is_spatial and w <= 32
    has_few_classes = is_nll and not is_spatial and classes <= MAX_CONSTANT_CLASSES
    few_threads = max(padded // 16, 1)
    # The second pass over a row finds it in the cache.
    is_cached = is_nll and not (is_spatial or is_whole) and classes * itemsize <= 2**17
    # Scalar 16-bit loads need more registers.
    needs_few_registers = is_plain and size == 1 and not (is_odd and itemsize == 2)
    if not body.startswith("softmax"):
        width = min(w, 16 if is_spatial else 2**10)
        spec = width, 2**10 // width, 4, 255
    elif is_spatial:
        spec = _spatial_spec(w, size, is_nll, has_delta)
    elif has_few_classes:
        spec = w, 64 // few_threads, 2, 64 * size
    elif is_whole:
        spec = _row_spec(w, size, is_nll)
    elif is_cached:
        # An odd number of classes is loaded one at a time, which needs many loads in flight.
        width = min(2**14 // itemsize * size, 2**13)
        spec = (width, 1, 8, 128) if is_odd else (width, 1, 16, 64)
    else:
        is_light = needs_few_registers and (is_index or itemsize == 2)
        is_lightest = is_nll or (is_light and not has_delta)
        spec = _part_spec(is_lightest, is_light, needs_few_registers)
    width, samples, warps, registers = spec
    width //= size
    vector_size = 1 if is_spatial else math.gcd(16 // itemsize, classes, width)
    threads_per_row = 1 if is_spatial else few_threads if has_few_classes else 32 * warps
    vectors = max(width // vector_size // threads_per_row, 1)
    # Four per multiprocessor of an H200.
    max_programs = 4 * 132 if is_cached and is_odd else MAX_PROGRAMS
    # A vector load of more than two samples would split each sample's classes between threads.
    max_alignment = 2 if fits_thread else 16
    return Tile(
        samples, width, warps, registers, max_programs, is_whole, vector_size, vectors,
        max_alignment,
    )  # fmt: skip


def _spatial_spec(w: int, size: int, is_nll: bool, has_delta: bool) -> TileSpec:
    """For contiguous samples, with strided classes."""
    if is_nll and w <= 32:  # A thread holds all classes of two samples, and exchanges nothing.
        return w, 256, 4, 255 if size == 2 else 168 if has_delta else 208
    if is_nll and w <= 64:
        return w, 128, 4, 208 if size == 1 else 255
    if is_nll:
        return 64, 64, 16, 128
    if w <= 64:
        return w, 64, max(w // 4, 4), 128
    return 32, 64, 16, 128


def _row_spec(w: int, size: int, is_nll: bool) -> TileSpec:
    """For whole rows of contiguous classes: several in a tile, or one."""
    if is_nll and w < 2**10:
        return w, max(2**9 // w, 1), 2, 64 * size
    if w < 2**10:
        return w, 2**10 // w, 4, 128
    if is_nll and w == 2**10:
        return w, 1, 2, 64
    if is_nll:
        return w, 1, w // 2**10, 96
    return w, 1, w // 2**8, 128


def _part_spec(is_lightest: bool, is_light: bool, needs_few_registers: bool) -> TileSpec:
    """For parts of rows: the fewer registers an element needs, the larger the tile."""
    if is_lightest:
        return 2**14, 1, 32, 64
    if is_light:
        return 2**13, 1, 16, 64
    return 2**12, 1, 16, 64 if needs_few_registers else 128
