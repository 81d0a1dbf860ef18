"""Tile sizes."""

import math
from typing import NamedTuple

import torch
import triton

# Programs of a launch at most, and so partial sums: enough to fill every GPU several times over.
MAX_PROGRAMS = 2**12
# Up to this many classes are a compile-time constant.
FEW = 32


class Tile(NamedTuple):
    """The part of the input that a program holds at a time."""

    samples: int
    classes: int
    warps: int
    registers: int  # Per thread at most; the default of ptxas spills, or limits occupancy.
    programs: int  # At most.
    is_whole: bool  # Whether it holds all classes, or moves over them.
    vector: int  # Contiguous classes per thread,
    per_thread: int  # and vectors per thread.
    alignment: int  # Upper bound on the alignment that Triton is told.

    @property
    def threads(self) -> int:
        """How many have classes of one sample."""
        return self.classes // self.vector // self.per_thread

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the tile."""
        return self.per_thread, self.samples, self.threads, self.vector


def configure(
    body: str,
    classes: int,
    inner: int,
    dtype: torch.dtype,
    itemsize: int,
    is_index: bool,
    is_exact: bool,
    is_light: bool,
) -> Tile:
    """Fixed choices; nothing is tuned at run time, so the first call is quick.

    `itemsize` is that of the input. `is_light`: there are no class weights, no smoothing, no
    gradient by the target.
    """
    size = dtype.itemsize // 4
    whole = triton.next_power_of_2(classes)
    w = whole * size  # The table is for float32; float64 halves its widths.
    is_spatial, is_odd = inner > 1, classes % 2 == 1
    # Scalar 16-bit loads need more registers.
    is_light = is_light and size == 1 and not (is_odd and itemsize == 2)
    is_softmax, is_class = body.startswith("softmax"), body == "softmax_of_class"
    is_few = is_class and not is_spatial and classes <= FEW
    is_narrow = is_light and (is_index or itemsize == 2)  # Little is read beside the logits.
    e = min(w, 16 if is_spatial else 2**10)
    row_threads = max(whole // 16, 1)
    is_whole = w <= (64 if is_spatial else 2**13 if is_class else 2**12)
    is_in_thread = is_class and is_spatial and w <= 32
    is_part = is_class and not (is_spatial or is_whole) and classes * itemsize <= 2**17
    loaded = min(2**14 // itemsize * size, 2**13)
    _, width, samples, warps, registers = next(row for row in (
        # Where; classes, samples, warps, registers. Each element is on its own.
        (not is_softmax, e, 2**10 // e, 4, 255),
        # Samples side by side: a thread holds all classes of two, and exchanges nothing,
        (is_in_thread, w, 256, 4, 255 if size == 2 else 208 if is_exact else 168),
        # or as many classes as fit in its registers.
        (is_spatial and is_class and is_whole, w, 128, 4, 208 if size == 1 else 255),
        (is_spatial and is_class, 64, 64, 16, 128),
        (is_spatial and is_whole, w, 64, max(w // 4, 4), 128),
        (is_spatial, 32, 64, 16, 128),
        # Rows, several of which lie in a tile,
        (is_few, w, 64 // row_threads, 2, 64 * size),
        (is_class and w < 2**10, w, max(2**9 // w, 1), 2, 64 * size),
        (w < 2**10, w, 2**10 // w, 4, 128),
        # or one,
        (is_class and w == 2**10, w, 1, 2, 64),
        (is_class and is_whole, w, 1, w // 2**10, 96),
        (is_whole, w, 1, w // 2**8, 128),
        # or a part of one: 16 KiB. Odd rows are loaded one class at a time, so that a thread must
        # have many loads under way.
        (is_part and is_odd, loaded, 1, 8, 128),
        (is_part, loaded, 1, 16, 64),
        # Rows that cache does not keep from one look to the next, or with targets beside them.
        (is_class or (is_narrow and is_exact), 2**14, 1, 32, 64),
        (is_narrow, 2**13, 1, 16, 64),
        (True, 2**12, 1, 16, 64 if is_light else 128),
    ) if row[0])  # fmt: skip
    width //= size
    vector = 1 if is_spatial else math.gcd(16 // itemsize, classes, width)
    threads = 1 if is_spatial else row_threads if is_few else 32 * warps
    per_thread = max(width // vector // threads, 1)
    # Four a multiprocessor of an H200.
    programs = 4 * 132 if is_part and is_odd else MAX_PROGRAMS
    # Loads of more than two samples would bring classes to other threads, to be exchanged.
    alignment = 2 if is_in_thread else 16
    return Tile(samples, width, warps, registers, programs, is_whole, vector, per_thread, alignment)
