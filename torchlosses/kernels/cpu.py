"""Loss and gradient in one pass on the CPU: ATen calls on blocks that stay in cache.

A loss is bound by memory, so what counts is how often a tensor as large as the input comes from
memory or goes there: each function says how often it reads (R) and writes (W) one. Whatever else
happens to a block happens in cache.

Arguments are canonical. `input` is contiguous and has the shape (outer, classes, inner), a dense
target likewise; class indices have the shape (outer, 1, inner), and so has what is known of each
sample: `scale`, the factor of its loss (a number where all have the same), and `kept`, False where
it is ignored (None where none is). Results are computed and losses returned in `dtype`; a gradient
has the dtype of its tensor and is None where `needs` does not ask for it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements in a block. Smaller ones drown in calls and in waking threads; the largest are out of
# cache, and hold memory.
BLOCK = 2**19

Block = tuple[slice, slice, slice]
Scale = Tensor | float


class Result(NamedTuple):
    """The loss, a sum or per sample (per element for squares), and the gradients asked for."""

    loss: Tensor
    grad_input: Tensor | None
    grad_target: Tensor | None


def squared_error(
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    scale: Scale,
    kept: Tensor | None,
    dtype: torch.dtype,
    is_sum: bool,
    needs: tuple[bool, bool],
) -> Result:
    """½ (y − t)² and y − t: R y, R t, W the gradient; of class indices R y, W the gradient."""
    grad_input, grad_target = _gradients(input, target, needs)
    scratch = _scratch(input, dtype, 1)
    losses = None if is_sum else torch.empty_like(input, dtype=dtype)
    is_plain = not isinstance(scale, Tensor) and scale == 1
    sums = []
    for block in _blocks(input):
        factor, is_kept = _at(scale, block), _at(kept, block)
        difference = _work(grad_input, block, input, dtype)
        if is_index:
            difference.copy_(input[block]).scatter_add_(
                1, target[block], -torch.ones_like(target[block], dtype=dtype)
            )
        else:
            torch.sub(input[block].to(dtype), target[block].to(dtype), out=difference)
        if is_kept is not None:
            difference.masked_fill_(~is_kept, 0)
        weighted = difference if is_plain else difference * factor
        squares = torch.mul(difference, weighted, out=_shaped(scratch[0], difference))
        if losses is None:
            sums.append(squares.sum(dtype=torch.float64))
        else:
            losses[block] = squares.div_(2)
        if grad_target is not None:
            grad_target[block] = weighted.neg()
        _store(grad_input, block, weighted)
    loss = _total(sums, dtype) / 2 if losses is None else losses
    return Result(loss, grad_input, grad_target)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
    scale: Scale,
    kept: Tensor | None,
    dtype: torch.dtype,
    is_sum: bool,
    needs: tuple[bool, bool],
) -> Result:
    """− Σₖ wₖ tₖ log(yₖ + δ) of whole rows: R y, R t, W the gradient.

    Smoothed class indices are such rows too; they are made a block at a time, and only in cache.
    """
    classes = input.shape[1]
    grad_input, grad_target = _gradients(input, target, needs)
    scratch = _scratch(input, dtype, 2 if from_logits else 1)
    losses = None if is_sum else input.new_empty((input.shape[0], 1, input.shape[2]), dtype=dtype)
    is_plain = not isinstance(scale, Tensor) and scale == 1
    sums = []
    for block in _blocks(input):
        factor, is_kept = _at(scale, block), _at(kept, block)
        if is_index:
            t = torch.full_like(input[block], label_smoothing / classes, dtype=dtype)
            t.scatter_add_(
                1, target[block], torch.full_like(target[block], 1 - label_smoothing, dtype=dtype)
            )
        else:
            t = target[block].to(dtype)
            if label_smoothing:
                t = t * (1 - label_smoothing) + label_smoothing / classes
        if weight is not None:
            t = t * weight
        slope = _work(grad_input, block, input, dtype)
        log = _shaped(scratch[0], t)
        if from_logits:
            _rows_from_logits(input[block].to(dtype), t, delta, slope, log, _shaped(scratch[1], t))
        else:
            torch.add(input[block].to(dtype), delta, out=log)
            if delta < torch.finfo(dtype).tiny:  # y + δ can be 0, and 0·log 0 is 0.
                log.masked_fill_((t == 0) & (log == 0), 1)
            torch.div(t, log, out=slope).neg_()
            log.log_()
        if is_kept is not None:
            log.masked_fill_(~is_kept, 0)
            slope.masked_fill_(~is_kept, 0)
        if grad_target is not None:
            by_target = log * (factor if weight is None else factor * weight)
            grad_target[block] = by_target * (label_smoothing - 1)
        terms = log.mul_(t)
        if not is_plain:
            terms.mul_(factor)
            slope.mul_(factor)
        if losses is None:
            sums.append(terms.sum(dtype=torch.float64))
        else:
            losses[block] = -terms.sum(1, keepdim=True)
        _store(grad_input, block, slope)
    loss = -_total(sums, dtype) if losses is None else losses
    return Result(loss, grad_input, grad_target)


def cross_entropy_of_class(
    input: Tensor,
    target: Tensor,
    *,
    delta: float,
    from_logits: bool,
    scale: Scale,
    kept: Tensor | None,
    dtype: torch.dtype,
    is_sum: bool,
    needs: tuple[bool, bool],
) -> Result:
    """− log(y_c + δ) of one class per row: W the gradient; from logits R x too."""
    grad_input, _ = _gradients(input, target, needs)
    if from_logits:
        log = torch.empty_like(target, dtype=dtype)
        for block in _blocks(input):
            label, factor, is_kept = target[block], _at(scale, block), _at(kept, block)
            work = _work(grad_input, block, input, dtype)
            if delta == 0:
                p = _softmax(torch.log_softmax, input[block].to(dtype), work)
                log[block] = p.gather(1, label)
                p.exp_()
                gate = torch.ones_like(label, dtype=dtype)
            else:
                p = _softmax(torch.softmax, input[block].to(dtype), work)
                of_class = p.gather(1, label)
                guarded = of_class + delta
                gate = of_class / guarded
                log[block] = guarded.log_()
            if grad_input is not None:
                gate = gate * factor
                p.mul_(gate).scatter_add_(1, label, -gate)
                if is_kept is not None:
                    p.masked_fill_(~is_kept, 0)
                _store(grad_input, block, p)
    else:
        guarded = input.gather(1, target).to(dtype) + delta
        if grad_input is not None:
            slope = -scale / guarded
            if kept is not None:
                slope.masked_fill_(~kept, 0)
            grad_input.zero_().scatter_(1, target, slope.to(input.dtype))
        log = guarded.log_()
    losses = log * -scale
    if kept is not None:
        losses.masked_fill_(~kept, 0)
    return Result(losses.sum() if is_sum else losses, grad_input, None)


def _rows_from_logits(
    x: Tensor, t: Tensor, delta: float, slope: Tensor, log: Tensor, gated: Tensor
) -> None:
    """`log` is log(p + δ) and `slope` p·S − t·p/(p+δ), S = Σₖ tₖpₖ/(pₖ+δ), of p = softmax(x)."""
    if delta == 0:
        _softmax(torch.log_softmax, x, log)
        torch.exp(log, out=slope)
        gated = t
        log.masked_fill_((t == 0) & (log == -torch.inf), 0)
    else:
        _softmax(torch.softmax, x, slope)
        torch.add(slope, delta, out=log)
        torch.div(slope, log, out=gated).mul_(t)
        log.log_()
    slope.mul_(gated.sum(1, keepdim=True)).sub_(gated)


def _blocks(input: Tensor) -> Iterator[Block]:
    """Slices of about `BLOCK` elements: whole rows of classes, several or a part of one `outer`."""
    outer, classes, inner = input.shape
    everything = slice(None)
    if classes * inner <= BLOCK:
        step = BLOCK // (classes * inner)
        for start in range(0, outer, step):
            yield slice(start, start + step), everything, everything
    else:
        step = max(BLOCK // classes, 1)
        for row in range(outer):
            for start in range(0, inner, step):
                yield slice(row, row + 1), everything, slice(start, start + step)


def _at(value: Any, block: Block) -> Any:
    """The part of a tensor that belongs to a block; a number or None as it is."""
    return value[block] if isinstance(value, Tensor) else value


def _gradients(
    input: Tensor, target: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(input) if needs[0] else None,
        torch.empty_like(target) if needs[1] else None,
    )


def _scratch(input: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Room for blocks, allocated once: fresh memory costs more than the arithmetic on it."""
    first = next(_blocks(input), None)
    return input.new_empty((count, 0 if first is None else input[first].numel()), dtype=dtype)


def _shaped(scratch: Tensor, like: Tensor) -> Tensor:
    return scratch[: like.numel()].view(like.shape)


def _work(grad: Tensor | None, block: Block, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a block is computed: in the gradient itself, or beside it if there is none to fit."""
    if grad is not None and grad.dtype == dtype:
        return grad[block]
    return torch.empty_like(input[block], dtype=dtype)


def _store(grad: Tensor | None, block: Block, value: Tensor) -> None:
    if grad is not None and grad[block].data_ptr() != value.data_ptr():
        grad[block] = value


def _softmax(function: Callable[..., Tensor], x: Tensor, out: Tensor) -> Tensor:
    """torch's softmax or its logarithm over dimension 1 of three."""
    if x.shape[2] == 1:  # Over the innermost dimension torch takes another way, five times as fast.
        function(x.squeeze(2), 1, out=out.squeeze(2))
    else:
        out.copy_(function(x, 1))
    return out


def _total(sums: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(sums).sum().to(dtype)
