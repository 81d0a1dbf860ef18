"""The losses and their gradients in NumPy and float64, written for the eye.

Everything else is tested against this file, so it shares nothing with the rest of the package: it
imports no torch, makes the one-hot rows that the rest avoids, and takes the closed formulas of the
gradients. Arguments are those of :mod:`torchlosses.functional`, as arrays, and are not checked. A
gradient is that of the loss by its `input`, and with ``reduction="none"`` that of the sum.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "cross_entropy_error",
    "cross_entropy_error_grad",
    "linear_cross_entropy_error",
    "linear_cross_entropy_error_grad",
    "sum_squared_error",
    "sum_squared_error_grad",
]

Array = NDArray[Any]


def sum_squared_error(input: ArrayLike, target: ArrayLike, **options: Any) -> Array:
    """E = ½ Σₖ (yₖ − tₖ)².

    >>> from torchlosses.reference import sum_squared_error
    >>> float(sum_squared_error([0.1, 0.6, 0.3], 1).round(6))
    0.13
    """
    return _squared_error(input, target, **options)[0]


def sum_squared_error_grad(input: ArrayLike, target: ArrayLike, **options: Any) -> Array:
    """∂E/∂y = y − t.

    >>> from torchlosses.reference import sum_squared_error_grad
    >>> sum_squared_error_grad([0.1, 0.6, 0.3], 1).round(6)
    array([ 0.1, -0.4,  0.3])
    """
    return _squared_error(input, target, **options)[1]


def cross_entropy_error(input: ArrayLike, target: ArrayLike, **options: Any) -> Array:
    """E = − Σₖ wₖ tₖ log(yₖ + δ), in nats, with y = softmax(x) from logits.

    >>> from torchlosses.reference import cross_entropy_error
    >>> float(cross_entropy_error([0.1, 0.6, 0.3], 1).round(6))
    0.510825
    """
    return _cross_entropy(input, target, **options)[0]


def cross_entropy_error_grad(input: ArrayLike, target: ArrayLike, **options: Any) -> Array:
    """∂E/∂yⱼ = −wⱼtⱼ / (yⱼ+δ); from logits pⱼ·S − wⱼtⱼ · pⱼ/(pⱼ+δ), S = Σₖ wₖtₖ · pₖ/(pₖ+δ).

    >>> from torchlosses.reference import cross_entropy_error_grad
    >>> cross_entropy_error_grad([0.1, 0.6, 0.3], 1).round(4) + 0
    array([ 0.    , -1.6667,  0.    ])
    """
    return _cross_entropy(input, target, **options)[1]


def linear_cross_entropy_error(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike = 0.0,
    **options: Any,
) -> Array:
    """The cross-entropy from the logits x Wᵀ + b.

    >>> from torchlosses.reference import linear_cross_entropy_error
    >>> float(linear_cross_entropy_error([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], 1).round(6))
    0.313262
    """
    logits = _linear(input, linear_weight, linear_bias)
    return _cross_entropy(logits, target, from_logits=True, dim=-1, **options)[0]


def linear_cross_entropy_error_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike = 0.0,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """G W, Gᵀ x and the sum of G over the samples, by x, W and b, with G = ∂E/∂(x Wᵀ + b).

    >>> from torchlosses.reference import linear_cross_entropy_error_grad
    >>> by_x, by_w, by_b = linear_cross_entropy_error_grad([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], 1)
    >>> by_x.round(4), by_w.round(4).tolist(), by_b.round(4)
    (array([ 0.2689, -0.2689]), [[0.2689, 0.5379], [-0.2689, -0.5379]], array([ 0.2689, -0.2689]))
    """
    x, w = np.asarray(input, np.float64), np.asarray(linear_weight, np.float64)
    logits = _linear(x, w, linear_bias)
    slopes = _cross_entropy(logits, target, from_logits=True, dim=-1, **options)[1]
    rows = slopes.reshape(-1, w.shape[0])
    counts = rows.any(1)  # A sample that is ignored may hold anything.
    by_w = rows[counts].T @ x.reshape(-1, w.shape[1])[counts]
    return slopes @ w, by_w, rows.sum(0)


@np.errstate(all="ignore")
def _linear(input: ArrayLike, linear_weight: ArrayLike, linear_bias: ArrayLike) -> Array:
    logits: Array = np.asarray(input, np.float64) @ np.asarray(linear_weight, np.float64).T
    return logits + np.asarray(linear_bias, np.float64)


@np.errstate(all="ignore")
def _squared_error(
    input: ArrayLike,
    target: ArrayLike,
    *,
    reduction: str = "sum",
    dim: int | None = None,
    ignore_index: int = -100,
    sample_weight: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    y, t, kept, axis, is_index = _canonical(input, target, dim, ignore_index)
    scale = np.asarray(sample_weight, np.float64)
    if is_index:
        scale = np.expand_dims(np.broadcast_to(scale, np.shape(target)), axis)
    scale = np.broadcast_to(scale, y.shape)
    losses = np.where(kept, scale * (y - t) ** 2 / 2, 0).reshape(np.shape(input))
    slopes = np.where(kept, scale * (y - t), 0)
    return _reduce(losses, slopes, reduction, np.where(kept, scale, 0), np.shape(input))


@np.errstate(all="ignore")
def _cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: str = "sum",
    delta: float = 1e-7,
    from_logits: bool = False,
    dim: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    y, t, kept, axis, is_index = _canonical(input, target, dim, ignore_index)
    classes = y.shape[axis]
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    w = _along(w, axis, y.ndim)
    samples = [size for d, size in enumerate(y.shape) if d != axis]
    scale = np.broadcast_to(np.asarray(sample_weight, np.float64), samples)
    scale = np.where(kept, np.expand_dims(scale, axis), 0)
    weights = np.sum(np.where(t == 0, 0, scale * w * t), axis) if is_index else scale

    t = (1 - label_smoothing) * t + label_smoothing / max(classes, 1)
    # A class that an index does not name is not there at all, whatever its number and weight are.
    is_absent = (t == 0) & is_index
    wt = np.where(is_absent, 0, w * t)
    if from_logits:
        z = y - np.max(y, axis, keepdims=True, initial=-np.inf)
        log_p = z - np.log(np.sum(np.exp(z), axis, keepdims=True))
        p = np.exp(log_p)
        log_guarded = log_p if delta == 0 else np.log(p + delta)
        gated = wt if delta == 0 else wt * p / (p + delta)
        slopes = (p * np.sum(gated, axis, keepdims=True) - gated) * scale
    else:
        log_guarded = np.log(y + delta)
        slopes = -wt * scale / (y + delta)
    is_absent |= (t == 0) & (log_guarded == -np.inf)  # 0·log 0 is 0.
    if not from_logits:
        slopes = np.where(is_absent, 0, slopes)
    terms = np.where(is_absent, 0, -wt * log_guarded)
    losses = np.where(kept, terms * scale, 0).sum(axis)
    slopes = np.where(kept, slopes, 0)
    return _reduce(losses, slopes, reduction, weights, np.shape(input))


def _canonical(
    input: ArrayLike, target: ArrayLike, dim: int | None, ignore_index: int
) -> tuple[Array, Array, Array, int, bool]:
    """y, t with one-hot rows made, what is kept (broadcasts to them), class axis, is it indices."""
    y, t = np.asarray(input, np.float64), np.asarray(target)
    if t.shape == y.shape:
        y, t = np.atleast_1d(y), np.atleast_1d(t)
    axis = range(y.ndim)[min(1, y.ndim - 1) if dim is None else dim]
    if t.shape == y.shape:
        return y, t.astype(np.float64), np.ones([1] * y.ndim, bool), axis, False
    t = np.expand_dims(t, axis)
    classes = _along(np.arange(y.shape[axis]), axis, y.ndim)
    return y, (t == classes).astype(np.float64), t != ignore_index, axis, True


def _along(classes: Array, axis: int, ndim: int) -> Array:
    return classes.reshape([classes.size if d == axis else 1 for d in range(ndim)])


def _reduce(
    losses: Array, slopes: Array, reduction: str, weights: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    slopes = slopes.reshape(shape)
    if reduction == "none":
        return losses, slopes
    divisor: Any = 1
    if reduction == "batchmean" and len(shape) > 1:
        divisor = max(shape[0], 1)
    if reduction == "mean" and np.any(weights != 0):  # Over nothing, the sum of 0 is the mean.
        divisor = np.sum(weights)
    return np.sum(losses) / divisor, slopes / divisor
