"""The losses as functions: check, then compute, then reduce."""

import math
from typing import Any

import torch
from torch import Tensor

from torchlosses import checks, formulas, fused, sharded
from torchlosses.checks import Classes

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
    if sharded.is_sharded(input, target, sample_weight):
        return sharded.run(
            sum_squared_error,
            input,
            target,
            dim,
            is_index=is_index,
            is_elementwise=True,
            sample_weight=sample_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            divisor=_divisor(reduction, input, None, None, input.numel(), dtype),
            dtype=dtype,
        )
    classes = checks.check_classes(target, input.shape[dim], ignore_index) if is_index else None
    weights = None if sample_weight is None else sample_weight.to(dtype)
    divisor = _divisor(reduction, input, classes, weights, input.numel(), dtype)
    if weights is not None:
        weights = weights.expand(target.shape)
        if is_index:
            weights = weights.unsqueeze(dim)

    def formula(input: Tensor, target: Tensor) -> Tensor:
        if classes is None:
            losses = formulas.squared_error(input.to(dtype), target.to(dtype))
        else:
            losses = formulas.squared_error_of_class(input.to(dtype), classes, dim)
        return _reduce(losses, weights, reduction, divisor)

    kernels = fused.find_kernels(input, target, sample_weight)
    if kernels is None:
        return formula(input, target)
    return fused.run(
        kernels,
        kernels.squared_error,
        formula,
        input,
        target,
        dim,
        classes,
        weights,
        divisor,
        losses_shape=input.shape if reduction == "none" else None,
        is_elementwise=not is_index,
        is_index=is_index,
        dtype=dtype,
    )


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
    samples = target.shape if is_index else checks.samples_shape(input, dim)
    checks.check_weights(input, weight, dim, sample_weight, samples)
    dtype = _compute_dtype(input, target)
    if sharded.is_sharded(input, target, weight, sample_weight):
        return sharded.run(
            cross_entropy_error,
            input,
            target,
            dim,
            is_index=is_index,
            is_elementwise=False,
            weight=weight,
            sample_weight=sample_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            divisor=_divisor(reduction, input, None, None, math.prod(samples), dtype),
            dtype=dtype,
            delta=delta,
            from_logits=from_logits,
            label_smoothing=label_smoothing,
        )
    classes = checks.check_classes(target, input.shape[dim], ignore_index) if is_index else None
    soft = None if is_index else target
    checks.check_values(input, soft, classes, dim, delta, from_logits, sample_weight)
    weights = class_weights = None if sample_weight is None else sample_weight.to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
        if classes is not None:  # As in torch, these weigh the samples too.
            # Under vmap torch would ask a 0-D index for its value, which is not to be had.
            class_weights = weight[classes.label.unsqueeze(dim)].squeeze(dim)
            if weights is not None:
                class_weights = class_weights * weights
    divisor = _divisor(reduction, input, classes, class_weights, math.prod(samples), dtype)
    if weights is not None:
        weights = weights.expand(samples)
    options: dict[str, Any] = {"delta": delta, "from_logits": from_logits}
    row_options = options | {"weight": weight, "label_smoothing": label_smoothing}

    def formula(input: Tensor, target: Tensor) -> Tensor:
        if classes is None:
            losses = formulas.cross_entropy(input.to(dtype), target.to(dtype), dim, **row_options)
        else:
            losses = formulas.cross_entropy_of_class(input.to(dtype), classes, dim, **row_options)
        return _reduce(losses, weights, reduction, divisor)

    kernels = fused.find_kernels(input, target, weight, sample_weight)
    if kernels is None:
        return formula(input, target)
    if classes is None or label_smoothing:
        kernel, factors = kernels.cross_entropy, weights
        options = row_options | {"is_index": is_index}
    else:
        kernel, factors = kernels.cross_entropy_of_class, class_weights
    return fused.run(
        kernels,
        kernel,
        formula,
        input,
        target,
        dim,
        classes,
        None if factors is None else factors.expand(samples).unsqueeze(dim),
        divisor,
        losses_shape=samples if reduction == "none" else None,
        is_elementwise=not (is_index or from_logits or label_smoothing or reduction == "none")
        and weight is None,
        dtype=dtype,
        **options,
    )


def _compute_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """float64 if input and target promote to it, and else float32, half precision included."""
    if torch.float64 in (input.dtype, target.dtype):
        return torch.float64
    return torch.float32


def _divisor(
    reduction: str,
    input: Tensor,
    classes: Classes | None,
    weights: Tensor | None,
    num_losses: int,
    dtype: torch.dtype,
) -> Tensor | float:
    """What the reduction divides the sum by: 1 where that is a sum over nothing.

    `weights` broadcast to what has a weight of its own, and that to the losses.
    """
    if reduction == "batchmean" and input.dim() > 1:
        return max(input.shape[0], 1)
    if reduction != "mean" or num_losses == 0:
        return 1
    kept = None if classes is None else classes.kept
    if weights is None:
        if kept is None:
            return num_losses
        return (kept.sum(dtype=dtype) * (num_losses // kept.numel())).clamp(min=1)
    if kept is not None:
        weights = weights.where(kept, 0)
    # Not expanded: torch adds what repeats one by one, and is a percent off at 10⁸ of them.
    total = weights.sum() * (num_losses // weights.numel())
    return total.where((weights != 0).any(), 1)


def _reduce(
    losses: Tensor, weights: Tensor | None, reduction: str, divisor: Tensor | float
) -> Tensor:
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if isinstance(divisor, int) and divisor == 1 else total / divisor
