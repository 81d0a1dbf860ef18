"""Sizes of tiles, by what a call is."""

import math
from typing import NamedTuple

import torch
import triton

# So many classes at most lie in one thread or two, and are known when the kernel is compiled.
FEW = 32


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
