"""Losses and gradients of a block of samples: one function for each name in `BODIES`.

Each returns weighted losses per sample, and stores the gradients that have a pointer, times
`grad_weight`. R and W say what it reads and writes: y or x is the input, t a dense target.
"""

import collections

import triton
import triton.language as tl

from torchlosses.kernels.triton.blocks import (
    LN_2,
    LOG2_E,
    _class_max,
    _class_sum,
    _exp,
    _load_input,
    _load_target_class,
    _load_targets,
    _log2,
    _make_tile,
    _over_classes,
    _pointers,
    _reciprocal,
    _store,
    _thread_max,
    _thread_sum,
)

SoftmaxTile = collections.namedtuple("SoftmaxTile", "x t target_is_zero dtarget class_mask offsets")


@triton.jit
def _squared_error(y, t, weight):
    """½ (y − t)², its derivative by y times `weight`, and its derivative by t."""
    difference = y - t
    loss = difference * (difference * 0.5)  # (y − t)² overflows earlier.
    return loss, difference * weight, -difference


@triton.jit
def _guarded_log(y, t, weight, target_is_zero, b, CONST: tl.constexpr):
    """−t·log(y + δ), its derivative by y times `weight`, and its derivative by t."""
    guarded = y + b.delta
    if CONST.IS_EXACT:  # 0·log 0 is 0.
        guarded = tl.where(target_is_zero & (guarded == 0), 1, guarded)
    log = _log2(guarded, CONST) * LN_2
    grad = -t * weight  # Before the quotient: t / (y + δ) may overflow where the result does not.
    grad = grad * _reciprocal(guarded, CONST) if CONST.APPROXIMATE else grad / guarded
    return -t * log, grad, -log


@triton.jit
def _element_loss(y, t, weight, target_is_zero, b, CONST: tl.constexpr):
    """The loss per element, its derivative by y times `weight`, and its derivative by t."""
    tl.static_assert(CONST.LOSS == "squares" or CONST.LOSS == "probabilities")
    if CONST.LOSS == "squares":
        return _squared_error(y, t, weight)
    else:  # noqa: RET505 - Only one branch is compiled.
        return _guarded_log(y, t, weight, target_is_zero, b, CONST)


@triton.jit
def _elementwise(args, b, CONST: tl.constexpr):
    """Σ over classes of a loss per element: R y, R t if dense, W each gradient."""
    total = tl.full(CONST.TILE.shape, 0, CONST.DTYPE)
    for start in range(0, b.classes, CONST.TILE.classes):
        k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
        y = _load_input(args, b, offsets, class_mask, 0, CONST)
        t, target_is_zero, dtarget = _load_targets(args, b, k, class_mask, offsets, is_label, CONST)
        weight = _over_classes(b.grad_weight)
        if CONST.PER_ELEMENT and args.upstream_ptr is not None:
            pointers = _over_classes(args.upstream_ptr + b.upstream)
            pointers = _pointers(pointers, k * args.upstream_class_stride, CONST)
            mask = _over_classes(b.is_valid) & class_mask
            weight *= tl.load(pointers, mask=mask, other=0).to(CONST.DTYPE)
        loss, grad, grad_target = _element_loss(y, t, weight, target_is_zero, b, CONST)
        _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
        _store(args.grad_target_ptr, b, offsets, class_mask, grad_target * dtarget * weight, CONST)
        loss = tl.where(class_mask, loss, 0) * _over_classes(b.weight)
        if CONST.PER_ELEMENT and not CONST.IS_REDUCED:
            _store(args.loss_ptr, b, offsets, class_mask, loss, CONST)
        else:
            total += loss
    return _class_sum(total)


@triton.jit
def _nll(args, b, CONST: tl.constexpr):
    """−log(y_c + δ) for the label c: R one element per sample, W the gradient."""
    guarded = tl.where(b.is_valid, _load_target_class(args, b, CONST) + b.delta, 1)
    if args.grad_input_ptr is not None:
        grad_label = _over_classes(-b.grad_weight / guarded)  # 1/guarded may overflow.
        grad_others = _over_classes(tl.where(b.is_valid, 0, b.grad_weight))  # 0, or NaN.
        for start in range(0, b.classes, CONST.TILE.classes):
            _k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
            grad = tl.where(is_label, grad_label, grad_others)
            _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
    return -tl.log(guarded) * b.weight


@triton.jit
def _thread_zeros(CONST: tl.constexpr):
    """One 0 per sample and thread."""
    return tl.full((1, CONST.TILE.samples, CONST.TILE.threads, 1), 0, CONST.DTYPE)


@triton.jit
def _normalize(args, b, HAS_TARGETS: tl.constexpr, CONST: tl.constexpr):
    """Online softmax: m = max x and Σ exp(x − m); with HAS_TARGETS also Σ t and Σ t·(x − m).

    Each thread keeps its own maximum and sums in registers, so the loop has no exchange between
    threads.
    """
    normalizer = _thread_zeros(CONST)
    # Start at the lowest finite value: −inf − (−inf) is NaN.
    maximum = tl.full(normalizer.shape, CONST.LOWEST, CONST.DTYPE)
    targets = _thread_zeros(CONST)
    products = _thread_zeros(CONST)
    for start in range(0, b.classes, CONST.TILE.classes):
        k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
        x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
        new_maximum = tl.maximum(maximum, _thread_max(x))
        shifted = x - new_maximum
        normalizer *= _exp(maximum - new_maximum)
        normalizer += _thread_sum(_exp(shifted))
        if HAS_TARGETS:
            t, _is_zero, _dtarget = _load_targets(args, b, k, class_mask, offsets, is_label, CONST)
            products += tl.where(targets == 0, 0, targets * (maximum - new_maximum))
            products += _thread_sum(tl.where(t == 0, 0, t * shifted))
            targets += _thread_sum(t)
        maximum = new_maximum
    row_maximum = _class_max(maximum)
    shift = maximum - _over_classes(row_maximum)
    normalizer = _class_sum(normalizer * _exp(shift))
    products += tl.where(targets == 0, 0, targets * shift)
    row_maximum = tl.where(b.is_valid, row_maximum, 0)
    normalizer = tl.where(b.is_valid, normalizer, 1)
    return row_maximum, normalizer, _class_sum(targets), _class_sum(products)


@triton.jit
def _softmax_nll(args, b, CONST: tl.constexpr):
    """−log(p_c + δ) and p_c / (p_c + δ) · (pⱼ − [j = c]), p = softmax(x): R x, W the gradient.

    Rows longer than a tile are read twice, the second time backwards, as the end is still cached.
    """
    # The order of these loads needs the fewest registers.
    if not (CONST.TILE.is_whole and (CONST.NUM_CLASSES or CONST.IS_SPATIAL)):
        x_c = _load_target_class(args, b, CONST)
    if CONST.TILE.is_whole:
        _k, class_mask, offsets, is_label = _make_tile(b, 0, CONST)
        x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
        if CONST.IS_SPATIAL:
            x_c = _load_target_class(args, b, CONST)
        elif CONST.NUM_CLASSES:  # The row is in registers: no second load waits for the label.
            x_c = _class_sum(tl.where(is_label, x, 0))
        maximum = tl.where(b.is_valid, _class_max(x), 0)
        exponential = _exp(x - _over_classes(maximum))
        normalizer = tl.where(b.is_valid, _class_sum(exponential), 1)
    else:
        maximum, normalizer, _sum_t, _products = _normalize(args, b, False, CONST)
    shifted = x_c - maximum
    inv_normalizer = _reciprocal(normalizer, CONST)
    grad_weight = b.grad_weight
    if CONST.IS_EXACT:
        log2 = shifted * LOG2_E - _log2(normalizer, CONST)
    else:
        p_c = _exp(shifted) * inv_normalizer
        log2 = _log2(p_c + b.delta, CONST)
        grad_weight *= p_c * _reciprocal(p_c + b.delta, CONST)
    if args.grad_input_ptr is not None:
        exp_scale = _over_classes(grad_weight * inv_normalizer)
        grad_weight = _over_classes(grad_weight)
        if CONST.TILE.is_whole:
            grad = exponential * exp_scale - tl.where(is_label, grad_weight, 0)
            _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
        else:
            tiles = tl.cdiv(b.classes, CONST.TILE.classes)
            for done in range(tiles):
                start = (tiles - 1 - done) * CONST.TILE.classes
                _k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
                x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
                exponential = _exp(x - _over_classes(maximum))
                grad = exponential * exp_scale - tl.where(is_label, grad_weight, 0)
                _store(args.grad_input_ptr, b, offsets, class_mask, grad, CONST)
    return log2 * -LN_2 * b.weight


@triton.jit
def _load_tile(args, b, start, CONST: tl.constexpr):
    """The logits of a tile, and its targets as `_load_targets` returns them."""
    k, class_mask, offsets, is_label = _make_tile(b, start, CONST)
    x = _load_input(args, b, offsets, class_mask, float("-inf"), CONST)
    t, target_is_zero, dtarget = _load_targets(args, b, k, class_mask, offsets, is_label, CONST)
    return SoftmaxTile(x, t, target_is_zero, dtarget, class_mask, offsets)


@triton.jit
def _guarded_softmax(b, x, maximum, log2_normalizer, CONST: tl.constexpr):
    """p = softmax(x), log₂(p + δ) and 1 / (p + δ)."""
    p = tl.exp2((x - _over_classes(maximum)) * LOG2_E - _over_classes(log2_normalizer))
    return p, _log2(p + b.delta, CONST), _reciprocal(p + b.delta, CONST)


@triton.jit
def _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST: tl.constexpr):
    """Stores pⱼ·(S − tⱼ/(pⱼ+δ)) and −log(pⱼ+δ)·∂t′/∂t, times `grad_weight`; see `_softmax`."""
    weight = _over_classes(b.grad_weight)
    if CONST.IS_EXACT:
        shifted = tile.x - _over_classes(maximum)
        exp_scale = _over_classes(s * tl.exp2(-log2_normalizer) * b.grad_weight)
        grad = _exp(shifted) * exp_scale - tile.t * weight
        log2 = shifted * LOG2_E - _over_classes(log2_normalizer)
        log2 = tl.where(tile.target_is_zero & (log2 == float("-inf")), 0, log2)  # 0·log 0 is 0.
    else:
        p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
        grad = p * (_over_classes(s) - tile.t * reciprocal) * weight
    grad_target = log2 * -LN_2 * tile.dtarget * weight
    _store(args.grad_input_ptr, b, tile.offsets, tile.class_mask, grad, CONST)
    _store(args.grad_target_ptr, b, tile.offsets, tile.class_mask, grad_target, CONST)


@triton.jit
def _softmax(args, b, CONST: tl.constexpr):
    """−Σ t·log(p + δ) and pⱼ·(S − tⱼ/(pⱼ+δ)), p = softmax(x), S = Σ tₖpₖ/(pₖ+δ).

    R x, R t if dense, W each gradient. Rows longer than a tile are read up to three times: for the
    normalizer, for S, and for the gradient. Each pass starts where the one before ended, in cache.
    With δ = 0, S is Σ t, which the first pass computes too.
    """
    tiles = tl.cdiv(b.classes, CONST.TILE.classes)
    if CONST.TILE.is_whole:
        tile = _load_tile(args, b, 0, CONST)
        maximum = tl.where(b.is_valid, _class_max(tile.x), 0)
        shifted = tile.x - _over_classes(maximum)
        log2_normalizer = _log2(tl.where(b.is_valid, _class_sum(_exp(shifted)), 1), CONST)
        if CONST.IS_EXACT:
            s = _class_sum(tile.t)
            loss = _class_sum(tl.where(tile.target_is_zero, 0, tile.t * shifted))
        else:
            p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
            s, loss = _class_sum(tile.t * p * reciprocal), _class_sum(tile.t * log2)
        _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST)
    else:
        maximum, normalizer, s, loss = _normalize(args, b, CONST.IS_EXACT, CONST)
        log2_normalizer = _log2(normalizer, CONST)
        if not CONST.IS_EXACT:
            thread_s = _thread_zeros(CONST)
            thread_loss = _thread_zeros(CONST)
            for done in range(tiles):
                tile = _load_tile(args, b, (tiles - 1 - done) * CONST.TILE.classes, CONST)
                p, log2, reciprocal = _guarded_softmax(b, tile.x, maximum, log2_normalizer, CONST)
                thread_s += _thread_sum(tile.t * p * reciprocal)
                thread_loss += _thread_sum(tile.t * log2)
            s, loss = _class_sum(thread_s), _class_sum(thread_loss)
        if args.grad_input_ptr is not None or args.grad_target_ptr is not None:
            for done in range(tiles):
                start = (tiles - 1 - done if CONST.IS_EXACT else done) * CONST.TILE.classes
                tile = _load_tile(args, b, start, CONST)
                _store_softmax_gradients(args, b, tile, maximum, log2_normalizer, s, CONST)
    if CONST.IS_EXACT:
        loss = loss * LOG2_E - s * log2_normalizer
    return loss * -LN_2 * b.weight
