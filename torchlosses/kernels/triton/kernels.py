"""The Triton kernels."""

import triton
import triton.language as tl

from torchlosses import formulas
from torchlosses.kernels.triton.blocks import (
    Factors,
    _block,
    _blocks,
    _classes,
    _is_ignored,
)
from torchlosses.kernels.triton.losses import (
    _element_of_class,
    _elements,
    _softmax,
    _softmax_of_class,
)

# Samples of float32 that are counted at a time.
COUNT_BLOCK = tl.constexpr(2**10)
LEAST_DIVISOR = tl.constexpr(formulas.LEAST_DIVISOR)


@triton.jit
def _count(g, first, step, P: tl.constexpr):
    """Σ of the weights of samples, and of their sizes, from a block on: R labels and weights."""
    # As many bytes in registers, whatever the dtype.
    BLOCK: tl.constexpr = COUNT_BLOCK // (P.DTYPE.primitive_bitwidth // 32)  # noqa: N806
    weights = tl.full((BLOCK,), 0, P.DTYPE)
    sizes = tl.full((BLOCK,), 0, P.DTYPE)
    for block in range(first, _blocks(g, P, BLOCK), step):
        b = _block(g, Factors(1, 1, 0, 0, 0), block, P, BLOCK)
        weights += b.counted
        sizes += tl.abs(b.counted)
    return tl.sum(weights), tl.sum(sizes)


@triton.jit
def _divisor(weights, sizes, g, P: tl.constexpr):
    """What `'mean'` divides by: 1 where nothing counts, which is not where weights cancel out."""
    if P.PER_ELEMENT:
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
def _add_up(sums_ptr, P: tl.constexpr):
    """Σ of what each program stored."""
    total = tl.full((1024,), 0, P.DTYPE)
    for start in range(0, tl.num_programs(0), 1024):
        program = start + tl.arange(0, 1024)
        mask = program < tl.num_programs(0)
        total += tl.load(sums_ptr + program, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def _count_kernel(g, sums_ptr, counter_ptr, P: tl.constexpr):
    """The divisor of `'mean'`, in the place of the loss: R labels and weights."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    weights, sizes = _count(g, program, programs, P)
    tl.store(sums_ptr + program, weights)
    tl.store(sums_ptr + programs + program, sizes)
    if _is_last(counter_ptr):
        weights, sizes = _add_up(sums_ptr, P), _add_up(sums_ptr + programs, P)
        tl.store(g.loss_ptr, _divisor(weights, sizes, g, P))


@triton.jit
def _loss_kernel(
    g, sums_ptr, counter_ptr,
    factor: tl.float64, delta: tl.float64, kept: tl.float64, uniform: tl.float64, P: tl.constexpr,
):  # fmt: skip
    """Every loss: what all forms have in common. R a label, and weights if any, per sample."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lift, by_divisor = 1, tl.full((), factor, P.DTYPE)
    if P.DIVISOR == "count_kernel":
        lift, by_divisor = _lifted(tl.load(g.loss_ptr))
    elif P.DIVISOR == "each_program":
        # Names of their own: in Triton 3.6 none is a scalar here and a block in the loop.
        all_weights, all_sizes = _count(g, 0, 1, P)
        lift, by_divisor = _lifted(_divisor(all_weights, all_sizes, g, P))
    f = Factors(
        lift, by_divisor, tl.full((), delta, P.DTYPE), tl.full((), kept, P.DTYPE),
        tl.full((), uniform, P.DTYPE),
    )  # fmt: skip

    total = tl.full((P.TILE.samples,), 0, P.DTYPE)
    weights = total
    sizes = total
    for block in range(program, _blocks(g, P, P.TILE.samples), programs):
        b = _block(g, f, block, P, P.TILE.samples)
        if P.BODY == "softmax_of_class":
            loss = _softmax_of_class(g, b, P)
        elif P.BODY == "softmax":
            loss = _softmax(g, b, P)
        elif P.BODY == "element_of_class":
            loss = _element_of_class(g, b, P)
        else:
            loss = _elements(g, b, P)
        if P.IS_REDUCED:
            total += loss
        elif not P.PER_ELEMENT:
            tl.store(g.loss_ptr + b.first + b.i, loss, mask=b.is_there)
        if P.DIVISOR == "last_program":
            weights += b.counted
            sizes += tl.abs(b.counted)

    if P.IS_REDUCED:
        tl.store(sums_ptr + program, tl.sum(total))
        if P.DIVISOR == "last_program":
            tl.store(sums_ptr + programs + program, tl.sum(weights))
            tl.store(sums_ptr + 2 * programs + program, tl.sum(sizes))
        if _is_last(counter_ptr):
            loss = _add_up(sums_ptr, P)
            if P.DIVISOR == "last_program":
                counted = _add_up(sums_ptr + programs, P)
                size = _add_up(sums_ptr + 2 * programs, P)
                last_lift, by_divisor = _lifted(_divisor(counted, size, g, P))
                loss *= last_lift
            tl.store(g.loss_ptr, loss * by_divisor)


@triton.jit
def _rescale_kernel(
    gradient_ptr, grad_loss_ptr, target_ptr, numel, ignore_index, row, inner, BLOCK: tl.constexpr
):
    """Multiplies the gradient in place, unless the factor is 1. R W the gradient.

    Labels are read if the factor is not finite, to keep ignored rows 0.
    """
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
