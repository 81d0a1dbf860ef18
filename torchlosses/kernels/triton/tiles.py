"""Tile sizes."""

import math
from typing import NamedTuple

import torch
import triton

# The most programs of a launch, and so partial sums: they fill every GPU several times over.
MAX_PROGRAMS = 2**12
# Up to this many classes are a compile-time constant.
MAX_CONSTANT_CLASSES = 32


class Tile(NamedTuple):
    """The part of the input that a program holds at a time."""

    samples: int
    classes: int
    warps: int
    registers: int  # Limit per thread; by the default of ptxas kernels spill, or occupancy drops.
    programs: int  # Limit per launch.
    is_whole: bool  # It holds all classes; else programs loop over them.
    vector: int  # Contiguous classes per thread.
    per_thread: int  # Vectors per thread.
    alignment: int  # Limit of the alignment that Triton is told.

    @property
    def threads(self) -> int:
        """Threads per sample."""
        return self.classes // self.vector // self.per_thread

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tile as a tensor."""
        return self.per_thread, self.samples, self.threads, self.vector


# Classes (counted in 4 bytes of the computing dtype), samples, warps and registers.
Shape = tuple[int, int, int, int]


def configure(
    body: str,
    classes: int,
    inner: int,
    dtype: torch.dtype,
    itemsize: int,
    is_index: bool,
    is_exact: bool,
    is_plain: bool,
) -> Tile:
    """The tile of a call, by fixed rules: tuning at run time would slow the first call.

    `itemsize` is that of the input. `is_plain`: no class weights, smoothing or target gradient.
    """
    size = dtype.itemsize // 4
    padded = triton.next_power_of_2(classes)
    w = padded * size
    is_spatial, is_odd, is_nll = inner > 1, classes % 2 == 1, body == "softmax_nll"
    is_whole = w <= (64 if is_spatial else 2**13 if is_nll else 2**12)
    fits_thread = is_nll and is_spatial and w <= 32
    is_few = is_nll and not is_spatial and classes <= MAX_CONSTANT_CLASSES
    few_threads = max(padded // 16, 1)
    # The second pass over a row finds it in the cache.
    is_cached = is_nll and not (is_spatial or is_whole) and classes * itemsize <= 2**17
    # Scalar 16-bit loads need more registers.
    is_plain = is_plain and size == 1 and not (is_odd and itemsize == 2)
    if not body.startswith("softmax"):
        width = min(w, 16 if is_spatial else 2**10)
        shape = width, 2**10 // width, 4, 255
    elif is_spatial:
        shape = _spatial_shape(w, size, is_nll, is_exact)
    elif is_few:
        shape = w, 64 // few_threads, 2, 64 * size
    elif is_whole:
        shape = _row_shape(w, size, is_nll)
    elif is_cached:
        # Odd rows are loaded one class at a time, so each thread needs many loads in flight.
        width = min(2**14 // itemsize * size, 2**13)
        shape = (width, 1, 8, 128) if is_odd else (width, 1, 16, 64)
    else:
        is_light = is_plain and (is_index or itemsize == 2)
        shape = _part_shape(is_nll or (is_light and is_exact), is_light, is_plain)
    width, samples, warps, registers = shape
    width //= size
    vector = 1 if is_spatial else math.gcd(16 // itemsize, classes, width)
    threads = 1 if is_spatial else few_threads if is_few else 32 * warps
    per_thread = max(width // vector // threads, 1)
    # Four per multiprocessor of an H200.
    programs = 4 * 132 if is_cached and is_odd else MAX_PROGRAMS
    # Loads of more than two samples would spread the classes of one over threads.
    alignment = 2 if fits_thread else 16
    return Tile(samples, width, warps, registers, programs, is_whole, vector, per_thread, alignment)


def _spatial_shape(w: int, size: int, is_nll: bool, is_exact: bool) -> Shape:
    """For contiguous samples, with strided classes."""
    if is_nll and w <= 32:  # A thread holds all classes of two samples, and exchanges nothing.
        return w, 256, 4, 255 if size == 2 else 208 if is_exact else 168
    if is_nll and w <= 64:
        return w, 128, 4, 208 if size == 1 else 255
    if is_nll:
        return 64, 64, 16, 128
    if w <= 64:
        return w, 64, max(w // 4, 4), 128
    return 32, 64, 16, 128


def _row_shape(w: int, size: int, is_nll: bool) -> Shape:
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


def _part_shape(is_largest: bool, is_light: bool, is_plain: bool) -> Shape:
    """For parts of rows: the less is read beside the logits, the larger."""
    if is_largest:
        return 2**14, 1, 32, 64
    if is_light:
        return 2**13, 1, 16, 64
    return 2**12, 1, 16, 64 if is_plain else 128
