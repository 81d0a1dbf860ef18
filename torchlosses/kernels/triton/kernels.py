"""The Triton kernels: divisor, loss and gradients, rescaling.

R and W say what a kernel reads and writes.
"""

import triton
import triton.language as tl

from torchlosses import formulas
from torchlosses.kernels.triton.blocks import (
    Scalars,
    _is_ignored,
    _make_block,
    _num_blocks,
    _num_classes,
)
from torchlosses.kernels.triton.losses import _elementwise, _nll, _softmax, _softmax_nll

# Samples per block of `_sum_weights`, for float32; float64 takes half as many.
DIVISOR_BLOCK = tl.constexpr(2**10)
LEAST_DIVISOR = tl.constexpr(formulas.LEAST_DIVISOR)


@triton.jit
def _sum_weights(args, first_block, step, CONST: tl.constexpr):
    """Σw and Σ|w| over every `step`-th block of samples: R labels and weights."""
    # The same number of bytes in registers for each dtype.
    BLOCK: tl.constexpr = DIVISOR_BLOCK // (CONST.DTYPE.primitive_bitwidth // 32)  # noqa: N806
    weights = tl.full((BLOCK,), 0, CONST.DTYPE)
    magnitudes = tl.full((BLOCK,), 0, CONST.DTYPE)
    for block in range(first_block, _num_blocks(args, CONST, BLOCK), step):
        # Only `divisor_weight` is used, which depends on no scalar.
        b = _make_block(args, Scalars(1, 1, 0, 0, 0), block, CONST, BLOCK)
        weights += b.divisor_weight
        magnitudes += tl.abs(b.divisor_weight)
    return tl.sum(weights), tl.sum(magnitudes)


@triton.jit
def _divisor(weights, magnitudes, args, CONST: tl.constexpr):
    """The divisor of `'mean'` from Σw and Σ|w|: 1 if all weights are 0, not if they cancel out."""
    if CONST.PER_ELEMENT:
        weights *= _num_classes(args, CONST)
    return tl.where(magnitudes == 0, 1, weights)


@triton.jit
def _scaled_inverse(divisor):
    """A scale s for all weights, and 1 / (s·divisor): s = 2⁶⁴ if 1/divisor overflows."""
    scale = tl.where(tl.abs(divisor) < LEAST_DIVISOR, 2.0**64, 1.0).to(divisor.dtype)
    return scale, 1 / (divisor * scale)


@triton.jit
def _arrive_and_check_last(counter_ptr):
    """Counts this program as finished. True in the last, which sees the stores of all.

    The last one resets the counter for the next launch.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _sum_partials(partials_ptr, CONST: tl.constexpr):
    """The sum of the partial sums of all programs."""
    total = tl.full((1024,), 0, CONST.DTYPE)
    for start in range(0, tl.num_programs(0), 1024):
        program = start + tl.arange(0, 1024)
        mask = program < tl.num_programs(0)
        total += tl.load(partials_ptr + program, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def _divisor_kernel(args, partials_ptr, counter_ptr, CONST: tl.constexpr):
    """Stores the divisor of `'mean'` where the loss will be: R labels and weights."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    weights, magnitudes = _sum_weights(args, program, num_programs, CONST)
    tl.store(partials_ptr + program, weights)
    tl.store(partials_ptr + num_programs + program, magnitudes)
    if _arrive_and_check_last(counter_ptr):
        weights = _sum_partials(partials_ptr, CONST)
        magnitudes = _sum_partials(partials_ptr + num_programs, CONST)
        tl.store(args.loss_ptr, _divisor(weights, magnitudes, args, CONST))


@triton.jit
def _loss_kernel(
    args, partials_ptr, counter_ptr, inv_divisor: tl.float64, delta: tl.float64,
    one_minus_eps: tl.float64, eps_per_class: tl.float64, CONST: tl.constexpr,
):  # fmt: skip
    """Loss and gradients, by the function that `CONST.BODY` names.

    R label, weights and upstream gradient of each sample, besides what that function reads.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    weight_scale, inverse = 1, tl.full((), inv_divisor, CONST.DTYPE)
    if CONST.DIVISOR_SOURCE == "divisor_kernel":
        weight_scale, inverse = _scaled_inverse(tl.load(args.loss_ptr))
    elif CONST.DIVISOR_SOURCE == "each_program":
        # Other names than in the loop below: Triton 3.6 lets no name change its shape.
        all_weights, all_magnitudes = _sum_weights(args, 0, 1, CONST)
        divisor = _divisor(all_weights, all_magnitudes, args, CONST)
        weight_scale, inverse = _scaled_inverse(divisor)
    scalars = Scalars(
        weight_scale, inverse, tl.full((), delta, CONST.DTYPE),
        tl.full((), one_minus_eps, CONST.DTYPE), tl.full((), eps_per_class, CONST.DTYPE),
    )  # fmt: skip

    total = tl.full((CONST.TILE.samples,), 0, CONST.DTYPE)
    weights = total
    magnitudes = total
    for block in range(program, _num_blocks(args, CONST, CONST.TILE.samples), num_programs):
        b = _make_block(args, scalars, block, CONST, CONST.TILE.samples)
        if CONST.BODY == "softmax_nll":
            loss = _softmax_nll(args, b, CONST)
        elif CONST.BODY == "softmax":
            loss = _softmax(args, b, CONST)
        elif CONST.BODY == "nll":
            loss = _nll(args, b, CONST)
        else:
            loss = _elementwise(args, b, CONST)
        if CONST.IS_REDUCED:
            total += loss
        elif not CONST.PER_ELEMENT:
            tl.store(args.loss_ptr + b.first + b.i, loss, mask=b.in_bounds)
        if CONST.DIVISOR_SOURCE == "last_program":
            weights += b.divisor_weight
            magnitudes += tl.abs(b.divisor_weight)

    if CONST.IS_REDUCED:
        tl.store(partials_ptr + program, tl.sum(total))
        if CONST.DIVISOR_SOURCE == "last_program":
            tl.store(partials_ptr + num_programs + program, tl.sum(weights))
            tl.store(partials_ptr + 2 * num_programs + program, tl.sum(magnitudes))
        if _arrive_and_check_last(counter_ptr):
            loss = _sum_partials(partials_ptr, CONST)
            if CONST.DIVISOR_SOURCE == "last_program":
                all_weights = _sum_partials(partials_ptr + num_programs, CONST)
                all_magnitudes = _sum_partials(partials_ptr + 2 * num_programs, CONST)
                divisor = _divisor(all_weights, all_magnitudes, args, CONST)
                last_scale, inverse = _scaled_inverse(divisor)
                loss *= last_scale
            tl.store(args.loss_ptr, loss * inverse)


@triton.jit
def _rescale_kernel(
    grad_ptr, upstream_ptr, target_ptr, numel, ignore_index, outer_stride, inner,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scales a gradient in place by the upstream gradient, unless that is 1: R W the gradient.

    If the upstream gradient is not finite it also reads the labels, to keep ignored rows 0.
    """
    upstream = tl.load(upstream_ptr)
    if upstream != 1:
        first_block = tl.program_id(0).to(tl.int64)
        for block in range(first_block, tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            offsets = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            grad = tl.load(grad_ptr + offsets, mask=offsets < numel).to(upstream.dtype)
            grad *= upstream
            if target_ptr is not None:  # noqa: SIM102 - Only this condition is a constant.
                if not tl.abs(upstream) < float("inf"):  # 0 times it is NaN.
                    samples = offsets // outer_stride * inner + offsets % inner
                    label = tl.load(target_ptr + samples, mask=offsets < numel)
                    grad = tl.where(_is_ignored(label, ignore_index), 0, grad)
            tl.store(grad_ptr + offsets, grad, mask=offsets < numel)
