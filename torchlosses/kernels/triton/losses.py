"""The losses of a block of samples, each form by what it reads (R) and writes (W)."""

import collections

import triton
import triton.language as tl

from torchlosses.kernels.triton.blocks import (
    LN_2,
    LOG2_E,
    _column,
    _exp,
    _load,
    _load_of_class,
    _log2,
    _max,
    _max_by_thread,
    _pointers,
    _reciprocal,
    _store,
    _sum,
    _sum_by_thread,
    _targets,
    _tile,
)

Operands = collections.namedtuple("Operands", "x t is_0 by_target in_row offsets")


@triton.jit
def _squared_error(y, t, weight):
    """½ (y − t)²."""
    difference = y - t
    term = difference * (difference * 0.5)  # Its square overflows first.
    return term, difference * weight, -difference


@triton.jit
def _guarded_log(y, t, weight, is_0, b, P: tl.constexpr):
    """−t·log(y + δ)."""
    guarded = y + b.delta
    if P.IS_EXACT:  # 0·log 0 is 0.
        guarded = tl.where(is_0 & (guarded == 0), 1, guarded)
    log = _log2(guarded, P) * LN_2
    slope = -t * weight  # First: their quotient by y + δ overflows where this does not.
    slope = slope * _reciprocal(guarded, P) if P.IS_FAST else slope / guarded
    return -t * log, slope, -log


@triton.jit
def _term(y, t, weight, is_0, b, P: tl.constexpr):
    """The loss of elements, its derivative by y times `weight`, and its derivative by t."""
    tl.static_assert(P.LOSS == "squares" or P.LOSS == "probabilities")  # Or nobody knows it.
    if P.LOSS == "squares":
        return _squared_error(y, t, weight)
    else:  # noqa: RET505 - Only one branch is compiled.
        return _guarded_log(y, t, weight, is_0, b, P)


@triton.jit
def _elements(g, b, P: tl.constexpr):
    """Terms of single elements: R y, R t if dense, W each gradient."""
    total = tl.full(P.TILE.shape, 0, P.DTYPE)
    for start in range(0, b.classes, P.TILE.classes):
        k, in_row, offsets, is_label = _tile(b, start, P)
        y = _load(g, b, offsets, in_row, 0, P)
        t, is_0, by_target = _targets(g, b, k, in_row, offsets, is_label, P)
        weight = _column(b.slope_weight)
        if P.PER_ELEMENT and g.upstream_ptr is not None:
            pointers = _column(g.upstream_ptr + b.upstream)
            pointers = _pointers(pointers, k * g.upstream_class_stride, P)
            mask = _column(b.is_used) & in_row
            weight *= tl.load(pointers, mask=mask, other=0).to(P.DTYPE)
        term, slope, target_slope = _term(y, t, weight, is_0, b, P)
        _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
        _store(g.grad_target_ptr, b, offsets, in_row, target_slope * by_target * weight, P)
        term = tl.where(in_row, term, 0) * _column(b.weight)  # No loss beyond the last class.
        if P.PER_ELEMENT and not P.IS_REDUCED:
            _store(g.loss_ptr, b, offsets, in_row, term, P)
        else:
            total += term
    return _sum(total)


@triton.jit
def _element_of_class(g, b, P: tl.constexpr):
    """−log(y_c + δ): R an entry per sample, W the gradient."""
    guarded = tl.where(b.is_used, _load_of_class(g, b, P) + b.delta, 1)
    if g.grad_input_ptr is not None:
        slope = _column(-b.slope_weight / guarded)  # 1/guarded may overflow.
        rest = _column(tl.where(b.is_used, 0, b.slope_weight))
        for start in range(0, b.classes, P.TILE.classes):
            _k, in_row, offsets, is_label = _tile(b, start, P)
            _store(g.grad_input_ptr, b, offsets, in_row, tl.where(is_label, slope, rest), P)
    return -tl.log(guarded) * b.weight


@triton.jit
def _normalizers(g, b, HAS_TERMS: tl.constexpr, P: tl.constexpr):
    """max x, Σ exp(x − max x), and maybe Σ t, Σ t·(x − max x), of rows longer than a tile.

    What one thread holds of a tile is reduced first, in its registers: the thread keeps one maximum
    and sums by it, and no step waits for other threads.
    """
    # Start at the lowest finite value: −inf − (−inf) is NaN.
    maximum = tl.full((1, P.TILE.samples, P.TILE.threads, 1), P.LOWEST, P.DTYPE)
    normalizer = tl.full((1, P.TILE.samples, P.TILE.threads, 1), 0, P.DTYPE)
    targets = tl.full((1, P.TILE.samples, P.TILE.threads, 1), 0, P.DTYPE)
    terms = tl.full((1, P.TILE.samples, P.TILE.threads, 1), 0, P.DTYPE)
    for start in range(0, b.classes, P.TILE.classes):
        k, in_row, offsets, is_label = _tile(b, start, P)
        x = _load(g, b, offsets, in_row, float("-inf"), P)
        highest = tl.maximum(maximum, _max_by_thread(x))
        shifted = x - highest
        normalizer *= _exp(maximum - highest)
        normalizer += _sum_by_thread(_exp(shifted))
        if HAS_TERMS:
            t, _is_0, _by_target = _targets(g, b, k, in_row, offsets, is_label, P)
            terms += tl.where(targets == 0, 0, targets * (maximum - highest))
            terms += _sum_by_thread(tl.where(t == 0, 0, t * shifted))
            targets += _sum_by_thread(t)
        maximum = highest
    of_row = _max(maximum)
    distance = maximum - _column(of_row)
    normalizer = _sum(normalizer * _exp(distance))
    terms += tl.where(targets == 0, 0, targets * distance)
    of_row = tl.where(b.is_used, of_row, 0)
    return of_row, tl.where(b.is_used, normalizer, 1), _sum(targets), _sum(terms)


@triton.jit
def _softmax_of_class(g, b, P: tl.constexpr):
    """−log(p_c + δ) and p_c / (p_c + δ) · (pⱼ − [j = c]), p = softmax(x): R x, W the gradient.

    Rows longer than a tile are looked at twice, the second time from their end, which the cache
    still has.
    """
    # In the order that needs the fewest registers.
    if not (P.TILE.is_whole and (P.NUM_CLASSES or P.IS_SPATIAL)):
        x_c = _load_of_class(g, b, P)
    if P.TILE.is_whole:
        _k, in_row, offsets, is_label = _tile(b, 0, P)
        x = _load(g, b, offsets, in_row, float("-inf"), P)
        if P.IS_SPATIAL:
            x_c = _load_of_class(g, b, P)
        elif P.NUM_CLASSES:  # The row is in registers: no second load waits for the label.
            x_c = _sum(tl.where(is_label, x, 0))
        maximum = tl.where(b.is_used, _max(x), 0)
        exponential = _exp(x - _column(maximum))
        normalizer = tl.where(b.is_used, _sum(exponential), 1)
    else:
        maximum, normalizer, _targets, _terms = _normalizers(g, b, False, P)
    shifted = x_c - maximum
    by_normalizer = _reciprocal(normalizer, P)
    gate = b.slope_weight
    if P.IS_EXACT:
        log2 = shifted * LOG2_E - _log2(normalizer, P)
    else:
        p = _exp(shifted) * by_normalizer
        log2 = _log2(p + b.delta, P)
        gate *= p * _reciprocal(p + b.delta, P)
    if g.grad_input_ptr is not None:
        by_exponential = _column(gate * by_normalizer)
        gate = _column(gate)
        if P.TILE.is_whole:
            slope = exponential * by_exponential - tl.where(is_label, gate, 0)
            _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
        else:
            tiles = tl.cdiv(b.classes, P.TILE.classes)
            for done in range(tiles):
                _k, in_row, offsets, is_label = _tile(b, (tiles - 1 - done) * P.TILE.classes, P)
                x = _load(g, b, offsets, in_row, float("-inf"), P)
                exponential = _exp(x - _column(maximum))
                slope = exponential * by_exponential - tl.where(is_label, gate, 0)
                _store(g.grad_input_ptr, b, offsets, in_row, slope, P)
    return log2 * -LN_2 * b.weight


@triton.jit
def _operands(g, b, start, P: tl.constexpr):
    """A tile of logits, what `_targets` says of it, which of its classes exist, and its offsets."""
    k, in_row, offsets, is_label = _tile(b, start, P)
    x = _load(g, b, offsets, in_row, float("-inf"), P)
    t, is_0, by_target = _targets(g, b, k, in_row, offsets, is_label, P)
    return Operands(x, t, is_0, by_target, in_row, offsets)


@triton.jit
def _guarded(b, x, maximum, log2_normalizer, P: tl.constexpr):
    """p = softmax(x), log₂(p + δ) and 1 / (p + δ)."""
    p = tl.exp2((x - _column(maximum)) * LOG2_E - _column(log2_normalizer))
    return p, _log2(p + b.delta, P), _reciprocal(p + b.delta, P)


@triton.jit
def _store_slopes(g, b, o, maximum, log2_normalizer, s, P: tl.constexpr):
    weight = _column(b.slope_weight)
    if P.IS_EXACT:
        shifted = o.x - _column(maximum)
        by_exponential = _column(s * tl.exp2(-log2_normalizer) * b.slope_weight)
        slope = _exp(shifted) * by_exponential - o.t * weight
        log2 = shifted * LOG2_E - _column(log2_normalizer)
        log2 = tl.where(o.is_0 & (log2 == float("-inf")), 0, log2)  # 0·log 0 is 0.
    else:
        p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
        slope = p * (_column(s) - o.t * reciprocal) * weight
    _store(g.grad_input_ptr, b, o.offsets, o.in_row, slope, P)
    _store(g.grad_target_ptr, b, o.offsets, o.in_row, log2 * -LN_2 * o.by_target * weight, P)


@triton.jit
def _softmax(g, b, P: tl.constexpr):
    """−Σ t·log(p + δ) and pⱼ·(S − tⱼ/(pⱼ+δ)), p = softmax(x), S = Σ tₖpₖ/(pₖ+δ).

    R x, R t if dense, W each gradient. Rows longer than a tile are looked at again, each time from
    where the last look ended, in cache: for S, which needs the normalizer, and for the gradient,
    which needs S. With δ = 0, S is Σ t, which the first look sees too.
    """
    tiles = tl.cdiv(b.classes, P.TILE.classes)
    if P.TILE.is_whole:
        o = _operands(g, b, 0, P)
        maximum = tl.where(b.is_used, _max(o.x), 0)
        shifted = o.x - _column(maximum)
        log2_normalizer = _log2(tl.where(b.is_used, _sum(_exp(shifted)), 1), P)
        if P.IS_EXACT:
            s, terms = _sum(o.t), _sum(tl.where(o.is_0, 0, o.t * shifted))
        else:
            p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
            s, terms = _sum(o.t * p * reciprocal), _sum(o.t * log2)
        _store_slopes(g, b, o, maximum, log2_normalizer, s, P)
    else:
        maximum, normalizer, s, terms = _normalizers(g, b, P.IS_EXACT, P)
        log2_normalizer = _log2(normalizer, P)
        if not P.IS_EXACT:
            s_by_thread = tl.full((1, P.TILE.samples, P.TILE.threads, 1), 0, P.DTYPE)
            terms_by_thread = tl.full((1, P.TILE.samples, P.TILE.threads, 1), 0, P.DTYPE)
            for done in range(tiles):
                o = _operands(g, b, (tiles - 1 - done) * P.TILE.classes, P)
                p, log2, reciprocal = _guarded(b, o.x, maximum, log2_normalizer, P)
                s_by_thread += _sum_by_thread(o.t * p * reciprocal)
                terms_by_thread += _sum_by_thread(o.t * log2)
            s, terms = _sum(s_by_thread), _sum(terms_by_thread)
        if g.grad_input_ptr is not None or g.grad_target_ptr is not None:
            for done in range(tiles):
                start = (tiles - 1 - done if P.IS_EXACT else done) * P.TILE.classes
                o = _operands(g, b, start, P)
                _store_slopes(g, b, o, maximum, log2_normalizer, s, P)
    if P.IS_EXACT:
        terms = terms * LOG2_E - s * log2_normalizer
    return terms * -LN_2 * b.weight
