"""The losses as functions: check, then compute, then reduce."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlosses import checks, formulas

__all__ = ["cross_entropy_error", "sum_squared_error"]


def sum_squared_error(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "sum",
    dim: int | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Sum of squared errors, E = ½ Σₖ (yₖ − tₖ)².

    The function behind :class:`torchlosses.SumSquaredError`, where every argument, dtype, error
    and source is described.

    >>> import torch
    >>> from torchlosses.functional import sum_squared_error
    >>> y = torch.tensor([0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0])
    >>> sum_squared_error(y, torch.tensor(2))
    tensor(0.0975)
    """
    checks.check_options(reduction, dim, ignore_index)
    dim = checks.check_dim(input, dim)
    is_index = checks.is_class_index(input, target, dim)
    checks.check_weights(input, None, dim, sample_weight, target.shape)
    dtype = _compute_dtype(input, target)
    if is_index:
        classes = checks.check_classes(target, input.shape[dim], ignore_index)
        losses = formulas.squared_error_of_class(input.to(dtype), classes, dim)
        weights = _sample_weights(sample_weight, classes.kept, target.shape, dtype)
        if weights is not None:
            weights = weights.unsqueeze(dim)
    else:
        losses = formulas.squared_error(input.to(dtype), target.to(dtype))
        weights = _sample_weights(sample_weight, None, target.shape, dtype)
    return _reduce(losses, weights, reduction, input, divisor_weights=weights)


def cross_entropy_error(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "sum",
    delta: float = 1e-7,
    from_logits: bool = False,
    dim: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy guarded by a δ, E = − Σₖ tₖ · log(yₖ + δ), in nats.

    The function behind :class:`torchlosses.CrossEntropyError`, where every argument, dtype, error
    and source is described.

    >>> import torch
    >>> from torchlosses.functional import cross_entropy_error
    >>> y = torch.tensor([0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0])
    >>> cross_entropy_error(y, torch.tensor(2))
    tensor(0.5108)
    """
    checks.check_options(reduction, dim, ignore_index, delta, label_smoothing)
    dim = checks.check_dim(input, dim)
    if input.dim() == 0 and target.shape == input.shape:  # One class, and no dimension for it.
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    is_index = checks.is_class_index(input, target, dim)
    samples = checks.samples_shape(input, dim)
    checks.check_weights(input, weight, dim, sample_weight, samples)
    checks.check_values(input, None if is_index else target, dim, from_logits, sample_weight)
    dtype = _compute_dtype(input, target)
    if weight is not None:
        weight = weight.to(dtype)
    if is_index:
        classes = checks.check_classes(target, input.shape[dim], ignore_index)
        losses = formulas.cross_entropy_of_class(
            input.to(dtype),
            classes,
            dim,
            weight=weight,
            delta=delta,
            from_logits=from_logits,
            label_smoothing=label_smoothing,
        )
        weights = _sample_weights(sample_weight, classes.kept, samples, dtype)
        divisor_weights = weights
        if weight is not None and reduction == "mean":
            divisor_weights = weight[classes.label]
            if weights is not None:
                divisor_weights = divisor_weights * weights
    else:
        losses = formulas.cross_entropy(
            input.to(dtype),
            target.to(dtype),
            dim,
            weight=weight,
            delta=delta,
            from_logits=from_logits,
            label_smoothing=label_smoothing,
        )
        weights = divisor_weights = _sample_weights(sample_weight, None, samples, dtype)
    return _reduce(losses, weights, reduction, input, divisor_weights)


def _compute_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """float64 if input and target promote to it, and else float32, half precision included."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    return dtype if dtype == torch.float64 else torch.float32


def _sample_weights(
    sample_weight: Tensor | None, kept: Tensor | None, samples: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """One weight per sample, 0 where it is ignored; None if every weight is 1."""
    if sample_weight is None:
        return None if kept is None else kept.to(dtype)
    weights = sample_weight.to(dtype).expand(samples)
    return weights if kept is None else weights.where(kept, 0)


def _reduce(
    losses: Tensor,
    weights: Tensor | None,
    reduction: str,
    input: Tensor,
    divisor_weights: Tensor | None,
) -> Tensor:
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    # Over nothing both kinds of mean are 0, with a gradient of 0.
    if reduction == "batchmean":
        return total / max(input.shape[0] if input.dim() > 1 else 1, 1)
    if divisor_weights is None:
        return total / max(losses.numel(), 1)
    divisor = divisor_weights.expand(losses.shape).sum()
    is_nothing = (divisor == 0) & (total == 0)
    return (total / divisor.where(~is_nothing, 1)).where(~is_nothing, 0)
