"""What the losses mean: a few lines of differentiable torch each.

These run on every device, under every transform of autograd and under the compiler. A faster way
to the same numbers is an optimisation, and wrong where it disagrees with this file.
"""

import torch
from torch import Tensor

from torchlosses.checks import Classes


def squared_error(input: Tensor, target: Tensor) -> Tensor:
    """½ (y − t)², elementwise."""
    difference = input - target
    return difference * difference / 2


def squared_error_of_class(input: Tensor, classes: Classes, dim: int) -> Tensor:
    """½ (y − t)², elementwise, where t is the one-hot row of a class."""
    input, index, kept = masked(input, classes, dim)
    if input.shape[dim] == 0:
        return input
    # y − t differs from y in one place per row, so the row t itself is never made.
    minus_one = input.new_full((), -1).expand(index.shape)
    difference = input.scatter_add(dim, index, minus_one)
    losses = difference * difference / 2
    return losses if kept is None else losses.where(kept.unsqueeze(dim), 0)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    dim: int,
    *,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
    log_normalizer: Tensor | None = None,
) -> Tensor:
    """− Σₖ wₖ · tₖ · log(yₖ + δ), per sample, with y = softmax(x) from logits.

    Logits that are shifted already come with their `log_normalizer`.
    """
    if from_logits and log_normalizer is None:
        input, log_normalizer = shifted(input, dim)
    if label_smoothing:
        classes = max(input.shape[dim], 1)
        target = (1 - label_smoothing) * target + label_smoothing / classes
    if delta < torch.finfo(input.dtype).tiny:  # y + δ can be 0, and 0·log 0 is 0.
        log_zero = -torch.inf if from_logits else 0
        input = input.masked_fill((target == 0) & (input == log_zero), 1)
    losses = -target * guarded_log(input, log_normalizer, delta)
    if weight is not None:
        losses = losses * along(weight, losses, dim)
    return losses.sum(dim)


def cross_entropy_of_class(
    input: Tensor,
    classes: Classes,
    dim: int,
    *,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
) -> Tensor:
    """− w_c · log(y_c + δ), per sample of class c, with y = softmax(x) from logits."""
    input, index, kept = masked(input, classes, dim)
    if input.shape[dim] == 0:
        return input.sum(dim)
    log_normalizer = None
    if from_logits:
        input, log_normalizer = shifted(input, dim)
    losses = -guarded_log(input.gather(dim, index), log_normalizer, delta).squeeze(dim)
    if weight is not None:
        losses = losses * weight[index].squeeze(dim)
    if label_smoothing:  # t = (1−ε)·[k=c] + ε/C, and Σₖ over the second part reads the whole row.
        uniform = -guarded_log(input, log_normalizer, delta)
        if weight is not None:
            uniform = uniform * along(weight, uniform, dim)
        uniform = label_smoothing * uniform.mean(dim)
        # An ε of 1 leaves nothing of the class by itself, not 0·∞ either.
        losses = uniform if label_smoothing == 1 else (1 - label_smoothing) * losses + uniform
    return losses if kept is None else losses.where(kept, 0)


def masked(input: Tensor, classes: Classes, dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`input` with impossible rows NaN and ignored rows cut off, the index, and what is kept."""
    kept, valid = classes.kept, classes.valid
    if valid is not None:  # A factor, because it makes the gradient of the whole row NaN too.
        one_or_nan = torch.where(valid, 1.0, torch.nan).to(input.dtype)
        input = input * one_or_nan.unsqueeze(dim)
    if kept is not None:  # Not a factor 0: that would let a NaN or inf of an ignored row through.
        input = input.where(kept.unsqueeze(dim), 1)
    return input, classes.label.unsqueeze(dim), kept


def shifted(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """z = x − max x and log Σ exp z, so that log softmax(x) = z − log Σ exp z."""
    if logits.shape[dim]:  # The maximum of no classes is not defined, and not needed.
        # softmax is the same for any shift, so the maximum takes no part in the derivatives.
        logits = logits - logits.detach().amax(dim, keepdim=True)
    return logits, logits.exp().sum(dim, keepdim=True).log()


def guarded_log(input: Tensor, log_normalizer: Tensor | None, delta: float) -> Tensor:
    """log(y + δ), where y is `input`, or exp(input − log_normalizer) from shifted logits."""
    if log_normalizer is not None:
        input = input - log_normalizer
        if delta == 0:
            return input
        input = input.exp()
    return (input + delta).log()  # With a δ of 0 too: it makes 0 of −0.0, whose slope is −∞.


def along(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    return weight.view([-1 if d == dim else 1 for d in range(like.dim())])
