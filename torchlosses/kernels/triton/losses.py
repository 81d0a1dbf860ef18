"""Losses and gradients of a block of samples: one function for each name in `BODIES`.

Each returns weighted losses per sample (`_elementwise` stores losses per element itself), and
stores the gradients that have a pointer, times `grad_scale`. R and W say what it reads and writes.
The input is x if logits, else y; t is the target w·t′ as `_load_targets` returns it. A derivative
by it, times `t_factor`, is the derivative by the user's target.
"""

import collections

import triton
import triton.language as tl

from torchlosses.kernels.triton.blocks import (
    LN_2,
    LOG2_E,
    _broadcast,
    _class_max,
    _class_sum,
    _exp,
    _load_input,
    _load_input_at_label,
    _load_targets,
    _log2,
    _make_tile,
    _reciprocal,
    _store,
    _thread_max,
    _thread_sum,
)

# The function that computes a loss: for dense targets, and for class indices.
# "elementwise" needs no normalizer; its losses may still be summed per sample.
BODIES = {
    "squares": ("elementwise", "elementwise"),
    "probabilities": ("elementwise", "nll"),
    "logits": ("softmax", "softmax_nll"),
}

SoftmaxTile = collections.namedtuple(
    "SoftmaxTile", "x t target_is_zero t_factor class_mask offsets"
)


def find_body(loss: str, is_index: bool, is_smoothed: bool) -> str:
    """The function that computes a loss. Smoothing turns a class index into a dense target."""
    return BODIES[loss][is_index and not is_smoothed]


@triton.jit
def _squared_error(y, t, scale):
    """The loss ½ (y − t)², scale · ∂loss/∂y, and ∂loss/∂t without the scale."""
    difference = y - t
    loss = difference * (difference * 0.5)  # (y − t)² overflows earlier.
    return loss, difference * scale, -difference


@triton.jit
def _cross_entropy(y, t, scale, target_is_zero, b, CONST: tl.constexpr):
    """The loss −t·log(y + δ), scale · ∂loss/∂y, and ∂loss/∂t without the scale."""
    guarded = y + b.delta
    if not CONST.HAS_DELTA:  # 0·log 0 is 0.
        guarded = tl.where(target_is_zero & (guarded == 0), 1, guarded)
    log = _log2(guarded, CONST) * LN_2
    grad = -t * scale  # Before the quotient: t / (y + δ) may overflow where the result does not.
    grad = grad * _reciprocal(guarded, CONST) if CONST.APPROXIMATE else grad / guarded
    return -t * log, grad, -log


@triton.jit
def _element_loss(y, t, scale, target_is_zero, b, CONST: tl.constexpr):
    """The loss of an element, scale · ∂loss/∂y, and ∂loss/∂t without the scale."""
    tl.static_assert(CONST.LOSS == "squares" or CONST.LOSS == "probabilities")
    if CONST.LOSS == "squares":
        return _squared_error(y, t, scale)
    else:  # noqa: RET505 - Only one branch is compiled.
        return _cross_entropy(y, t, scale, target_is_zero, b, CONST)


@triton.jit
def _elementwise(args, b, CONST: tl.constexpr):
    """Σ over classes of a loss per element: R y, R t if dense, W each gradient."""
    total = tl.full(CONST.TILE.shape, 0, CONST.DTYPE)
    for start in range(0, b.classes, CONST.TILE.classes):
        k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
        y = _load_input(args, b, offsets, class_mask, 0, CONST)
        t, target_is_zero, t_factor = _load_targets(
            args, b, k, class_mask, offsets, is_label, CONST
        )
        scale = _broadcast(b.grad_scale)
        if CONST.PER_ELEMENT and args.upstream_ptr is not None:
            # Without `_pointers`, which is for contiguous classes.
            pointers = _broadcast(args.upstream_ptr + b.upstream_offset)
            pointers += k * args.upstream_class_stride
            mask = _broadcast(b.is_valid) & class_mask
            scale *= tl.load(pointers, mask=mask, other=0).to(CONST.DTYPE)
        loss, grad, grad_target = _element_loss(y, t, scale, target_is_zero, b, CONST)
        _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
        _store(args.grad_target_ptr, b, offsets, class_mask, grad_target * t_factor * scale, CONST)
        loss = tl.where(class_mask, loss, 0) * _broadcast(b.weight)
        if CONST.PER_ELEMENT and not CONST.IS_REDUCED:
            _store(args.loss_ptr, b, offsets, class_mask, loss, CONST)
        else:
            total += loss
    return _class_sum(total)


@triton.jit
def _nll(args, b, CONST: tl.constexpr):
    """−log(y_c + δ) for the label c: R one element per sample, W the gradient."""
    guarded = tl.where(b.is_valid, _load_input_at_label(args, b, CONST) + b.delta, 1)
    if args.grad_input_ptr is not None:
        grad_label = _broadcast(-b.grad_scale / guarded)  # 1/guarded may overflow.
        grad_others = _broadcast(tl.where(b.is_valid, 0, b.grad_scale))  # 0, or NaN.
        for start in range(0, b.classes, CONST.TILE.classes):
            _k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
            grad = tl.where(is_label, grad_label, grad_others)
            _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
    return -tl.log(guarded) * b.weight


@triton.jit
def _thread_zeros(CONST: tl.constexpr):
    """One 0 per sample and thread."""
    return tl.full((1, CONST.TILE.samples, CONST.TILE.row_threads, 1), 0, CONST.DTYPE)


@triton.jit
def _normalize(args, b, HAS_TARGETS: tl.constexpr, CONST: tl.constexpr):
    """Online softmax: m = max x, Σ exp(x − m), Σ t and Σ t·(x − m); the last two need HAS_TARGETS.

    Each thread keeps its own maximum and sums in registers, so with inner = 1 the loop has no
    exchange between threads.
    """
    normalizer = _thread_zeros(CONST)
    # Start at the lowest finite value: −inf − (−inf) is NaN.
    maximum = tl.full(normalizer.shape, CONST.LOWEST, CONST.DTYPE)
    sum_t = _thread_zeros(CONST)
    sum_products = _thread_zeros(CONST)
    for start in range(0, b.classes, CONST.TILE.classes):
        k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
        x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
        new_maximum = tl.maximum(maximum, _thread_max(x))
        shifted = x - new_maximum
        normalizer *= _exp(maximum - new_maximum)
        normalizer += _thread_sum(_exp(shifted))
        if HAS_TARGETS:
            # While Σ t is 0, `maximum` may be LOWEST; minus a large logit it is −∞, and 0·∞ is NaN.
            sum_products += tl.where(sum_t == 0, 0, sum_t * (maximum - new_maximum))
            t, is_zero, _t_factor = _load_targets(args, b, k, class_mask, offsets, is_label, CONST)
            sum_products += _thread_sum(tl.where(is_zero, 0, t * shifted))
            sum_t += _thread_sum(t)
        maximum = new_maximum
    row_maximum = _class_max(maximum)
    shift = maximum - _broadcast(row_maximum)
    normalizer = _class_sum(normalizer * _exp(shift))
    sum_products += tl.where(sum_t == 0, 0, sum_t * shift)
    row_maximum = tl.where(b.is_valid, row_maximum, 0)
    normalizer = tl.where(b.is_valid, normalizer, 1)
    return row_maximum, normalizer, _class_sum(sum_t), _class_sum(sum_products)


@triton.jit
def _softmax_nll(args, b, CONST: tl.constexpr):
    """−log(p_c + δ) and p_c / (p_c + δ) · (pⱼ − [j = c]), p = softmax(x): R x, W the gradient.

    Rows longer than a tile are read twice, the second time backwards, as the end is still cached.
    """
    if CONST.TILE.is_whole:
        _k, class_mask, offsets, is_label = _make_tile(b, 0, CONST)
        # x and x_c are loaded in the order that needs the fewest registers.
        if CONST.IS_SPATIAL:
            x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
            x_c = _load_input_at_label(args, b, CONST)
        elif CONST.NUM_CLASSES:  # Few classes: it is cheap to find x_c among the registers of x.
            x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
            x_c = _class_sum(tl.where(is_label, x, 0))
        else:
            x_c = _load_input_at_label(args, b, CONST)
            x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
        maximum = tl.where(b.is_valid, _class_max(x), 0)
        exponential = _exp(x - _broadcast(maximum))
        normalizer = tl.where(b.is_valid, _class_sum(exponential), 1)
    else:
        x_c = _load_input_at_label(args, b, CONST)
        maximum, normalizer, _sum_t, _sum_products = _normalize(args, b, False, CONST)
    shifted = x_c - maximum
    inv_normalizer = _reciprocal(normalizer, CONST)
    grad_scale = b.grad_scale
    if CONST.HAS_DELTA:
        p_c = _exp(shifted) * inv_normalizer
        log2 = _log2(p_c + b.delta, CONST)
        grad_scale *= p_c * _reciprocal(p_c + b.delta, CONST)
    else:
        log2 = shifted * LOG2_E - _log2(normalizer, CONST)
    if args.grad_input_ptr is not None:
        exp_scale = _broadcast(grad_scale * inv_normalizer)
        grad_scale = _broadcast(grad_scale)
        if CONST.TILE.is_whole:
            grad = exponential * exp_scale - tl.where(is_label, grad_scale, 0)
            _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
        else:
            num_tiles = tl.cdiv(b.classes, CONST.TILE.classes)
            for done in range(num_tiles):
                start = (num_tiles - 1 - done) * CONST.TILE.classes
                _k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
                x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
                exponential = _exp(x - _broadcast(maximum))
                grad = exponential * exp_scale - tl.where(is_label, grad_scale, 0)
                _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
    return log2 * -LN_2 * b.weight


@triton.jit
def _load_tile(args, b, start, CONST: tl.constexpr):
    """The logits of a tile, and its targets as `_load_targets` returns them."""
    k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
    x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
    t, target_is_zero, t_factor = _load_targets(args, b, k, class_mask, offsets, is_label, CONST)
    return SoftmaxTile(x, t, target_is_zero, t_factor, class_mask, offsets)


@triton.jit
def _guarded_softmax(b, x, maximum, log2_normalizer, CONST: tl.constexpr):
    """p = softmax(x), log₂(p + δ) and 1 / (p + δ)."""
    p = tl.exp2((x - _broadcast(maximum)) * LOG2_E - _broadcast(log2_normalizer))
    return p, _log2(p + b.delta, CONST), _reciprocal(p + b.delta, CONST)


@triton.jit
def _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST: tl.constexpr):
    """Stores pⱼ·(S − tⱼ/(pⱼ+δ)) and −log(pⱼ+δ)·t_factorⱼ, times `grad_scale`; see `_softmax`."""
    scale = _broadcast(b.grad_scale)
    if CONST.HAS_DELTA:
        p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
        grad = p * (_broadcast(s) - tile.t * reciprocal) * scale
    else:
        shifted = tile.x - _broadcast(maximum)
        exp_scale = _broadcast(s * tl.exp2(-log2_normalizer) * b.grad_scale)
        grad = _exp(shifted) * exp_scale - tile.t * scale
        log2 = shifted * LOG2_E - _broadcast(log2_normalizer)
        log2 = tl.where(tile.target_is_zero & (log2 == float("-inf")), 0, log2)  # 0·log 0 is 0.
    grad_target = log2 * -LN_2 * tile.t_factor * scale
    _store(args.grad_input_ptr, b, tile.offsets, tile.class_mask, grad, CONST)
    _store(args.grad_target_ptr, b, tile.offsets, tile.class_mask, grad_target, CONST)


@triton.jit
def _softmax(args, b, CONST: tl.constexpr):
    """−Σ t·log(p + δ) and pⱼ·(S − tⱼ/(pⱼ+δ)), p = softmax(x), S = Σ tₖpₖ/(pₖ+δ).

    R x, R t if dense, W each gradient. Rows longer than a tile are read up to three times: for the
    normalizer, for S and the loss, and for the gradients. Each pass starts where the one before
    ended, in cache. With δ = 0 the first pass computes S = Σ t and the loss too.
    """
    if CONST.TILE.is_whole:
        tile = _load_tile(args, b, 0, CONST)
        maximum = tl.where(b.is_valid, _class_max(tile.x), 0)
        shifted = tile.x - _broadcast(maximum)
        log2_normalizer = _log2(tl.where(b.is_valid, _class_sum(_exp(shifted)), 1), CONST)
        if CONST.HAS_DELTA:
            p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
            s, sum_t_log2 = _class_sum(tile.t * p * reciprocal), _class_sum(tile.t * log2)
        else:
            s = _class_sum(tile.t)
            sum_products = _class_sum(tl.where(tile.target_is_zero, 0, tile.t * shifted))
        _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST)
    else:
        maximum, normalizer, sum_t, sum_products = _normalize(args, b, not CONST.HAS_DELTA, CONST)
        log2_normalizer = _log2(normalizer, CONST)
        num_tiles = tl.cdiv(b.classes, CONST.TILE.classes)
        if CONST.HAS_DELTA:
            thread_s = _thread_zeros(CONST)
            thread_t_log2 = _thread_zeros(CONST)
            for done in range(num_tiles):
                tile = _load_tile(args, b, (num_tiles - 1 - done) * CONST.TILE.classes, CONST)
                p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
                thread_s += _thread_sum(tile.t * p * reciprocal)
                thread_t_log2 += _thread_sum(tile.t * log2)
            s, sum_t_log2 = _class_sum(thread_s), _class_sum(thread_t_log2)
        else:
            s = sum_t
        if args.grad_input_ptr is not None or args.grad_target_ptr is not None:
            for done in range(num_tiles):
                start = (done if CONST.HAS_DELTA else num_tiles - 1 - done) * CONST.TILE.classes
                tile = _load_tile(args, b, start, CONST)
                _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST)
    if not CONST.HAS_DELTA:  # log p = x − m − log Σ exp(x − m).
        sum_t_log2 = sum_products * LOG2_E - s * log2_normalizer
    return sum_t_log2 * -LN_2 * b.weight
