"""Loss and gradient in one pass on the CPU: ATen calls on blocks that stay in cache.

A loss is bound by memory, so what counts is how often a tensor as large as the input comes from
memory or goes there: each function says how often it reads (R) and writes (W) one. Whatever else
happens to a block happens in cache, in scratch that is allocated once. A small loss is bound by
calls instead: an input of one block goes through no loop, and constants are tensors already.

Arguments are canonical. `input` is contiguous and has the shape (outer, classes) or (outer,
classes, inner), a dense target likewise; class indices, of any integer dtype, have 1 in the place
of classes, and so has `scale`, the factor of each sample's loss (None where all are 1). Samples of
class `ignore_index` count for nothing (None: there are none). The loss is divided by `divisor`, a
number or a 0-D tensor. Results are computed and losses returned in `dtype`; a gradient has the
dtype of its tensor and is None where `needs` does not ask for it.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements in a block. Smaller ones drown in calls and in waking threads; larger ones leave the
# cache, and their scratch is memory that the caller misses.
BLOCK = 2**19
TINY = torch.finfo(torch.float32).tiny

Needs = tuple[bool, bool]
Room = Sequence[Tensor | None]
# From a block's input and target in the dtype of computation, and room to work in, the last of it
# for the slope by the input (None is fresh memory): the terms that sum to the loss, and the slopes
# by input and target if they are asked for. They are new tensors.
Body = Callable[[Tensor, Tensor, Room], tuple[Tensor, Tensor | None, Tensor | None]]


class Result(NamedTuple):
    """The loss, a sum or per sample (per element for squares), and the gradients asked for."""

    loss: Tensor
    grad_input: Tensor | None
    grad_target: Tensor | None


def squared_error(
    input: Tensor, target: Tensor, *, is_index: bool, needs: Needs, **common: Any
) -> Result:
    """½ (y − t)² and y − t: R y, R t, W the gradient; of class indices R y, W the gradient."""

    def body(y: Tensor, t: Tensor, room: Room) -> Any:
        if is_index:
            minus_one = _constant(-1, y.dtype).expand(t.shape)
            difference = torch.scatter_add(y, 1, t, minus_one, out=room[-1])
        else:
            difference = torch.sub(y, t, out=room[-1])
        zero = _constant(0, y.dtype)
        terms = torch.addcmul(zero, difference, difference, value=0.5, out=room[0])
        return terms, difference, -difference if needs[1] else None

    return _run(
        body, input, target,
        is_index=is_index, needs=needs, rooms=2, is_elementwise=True, **common,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
    needs: Needs,
    **common: Any,
) -> Result:
    """− Σₖ wₖ tₖ log(yₖ + δ) of whole rows: R y, R t, W the gradient.

    Smoothed class indices are such rows too; they are made a block at a time, and only in cache.
    """
    uniform = label_smoothing / input.shape[1]
    if weight is not None:
        weight = weight.view([-1] + [1] * (input.dim() - 2))

    def body(y: Tensor, t: Tensor, room: Room) -> Any:
        zero = _constant(0, y.dtype)
        if is_index:
            rest = y.new_full((), 1 - label_smoothing).expand(t.shape)
            t = torch.full_like(y, uniform).scatter_add_(1, t, rest)
        elif label_smoothing:
            t = t * (1 - label_smoothing) + uniform
        # Without a δ to speak of, y + δ can be 0: 0·log 0 is 0, but a weight of 0 leaves it NaN.
        is_zero: Any = t == 0 if delta < TINY else None
        if weight is not None:
            t = t * weight
        slope = slope_t = None
        if from_logits and not delta:
            log = _softmax(y, is_log=True, out=room[0])
            if needs[0]:
                y = torch.exp(log, out=room[1])
                slope = torch.neg(t, out=room[-1])
            log.masked_fill_(is_zero & (log == -torch.inf), 0)
        else:
            if from_logits:
                y = _softmax(y, is_log=False, out=room[1])
            log = torch.add(y, _constant(delta, y.dtype), out=room[0])
            if is_zero is not None:
                log.masked_fill_(is_zero & (log == 0), 1)
            if needs[0]:
                slope = torch.addcdiv(zero, t, log, value=-1, out=room[-1])
                if from_logits:
                    slope.mul_(y)
            log.log_()
        if from_logits and slope is not None:
            # With sₖ = yₖ·∂E/∂yₖ the gradient by the logits is s − y·Σ s.
            torch.addcmul(slope, y, slope.sum(1, keepdim=True), value=-1, out=slope)
        if needs[1]:
            slope_t = log * ((label_smoothing - 1) * (1 if weight is None else weight))
        return torch.addcmul(zero, log, t, value=-1, out=log), slope, slope_t

    rooms = (2 if from_logits else 1) + needs[0]
    return _run(body, input, target, is_index=is_index, needs=needs, rooms=rooms, **common)


def cross_entropy_of_class(
    input: Tensor,
    target: Tensor,
    *,
    delta: float,
    from_logits: bool,
    needs: Needs,
    **common: Any,
) -> Result:
    """− log(y_c + δ) of one class per row: W the gradient; from logits R x too."""

    def body(x: Tensor, label: Tensor, room: Room) -> Any:
        y = _softmax(x, is_log=not delta, out=room[0])
        log = y.gather(1, label)
        gate = None
        if delta:
            guarded = log + _constant(delta, x.dtype)
            gate, log = log.div_(guarded), guarded.log_()
        if not needs[0]:
            return log.neg_(), None, None
        if gate is None:
            gate = torch.ones_like(log)
            y.exp_()
        slope = torch.mul(y, gate, out=y if room[-1] is None else room[-1])
        return log.neg_(), slope.scatter_add_(1, label, gate.neg_()), None

    if from_logits:
        rooms = 1 + needs[0]
        return _run(body, input, target, is_index=True, needs=needs, rooms=rooms, **common)
    return _of_class(input, target, delta, needs, **common)


def rescale(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient times that of the loss, which comes as one number or one per loss; in place."""
    is_one = grad_loss.item() == 1 if grad_loss.dim() == 0 else bool((grad_loss == 1).all())
    return gradient if is_one else gradient.mul_(grad_loss)


def _of_class(
    input: Tensor,
    target: Tensor,
    delta: float,
    needs: Needs,
    *,
    ignore_index: int | None,
    scale: Tensor | None,
    divisor: Tensor | float,
    dtype: torch.dtype,
    is_sum: bool,
) -> Result:
    """From probabilities only the entries of the targets are looked at, all in one block."""
    label, kept = _label(target, ignore_index)
    guarded = _to(input.gather(1, label), dtype) + _constant(delta, dtype)
    grad_input = None
    if needs[0]:
        slope = torch.div(_constant(-1, dtype), guarded)
        slope = _to(_weigh(slope, _factor(scale, divisor), kept), input.dtype)
        grad_input = _empty(input, input.dtype).zero_()
        # By its bits: bfloat16 itself torch scatters in a float32 copy of the whole.
        bits = torch.int16 if input.dtype == torch.bfloat16 else input.dtype
        grad_input.view(bits).scatter_(1, label, slope.view(bits))
    losses = _weigh(guarded.log_(), scale, kept)
    loss = losses.sum() if is_sum else losses
    return Result(_divided(loss.neg_(), divisor), grad_input, None)


def _run(
    body: Body,
    input: Tensor,
    target: Tensor,
    *,
    is_index: bool,
    ignore_index: int | None,
    scale: Tensor | None,
    divisor: Tensor | float,
    dtype: torch.dtype,
    is_sum: bool,
    needs: Needs,
    rooms: int,
    is_elementwise: bool = False,
) -> Result:
    """What a body gives for all blocks: its terms, and its slopes."""

    def compute(y: Tensor, t: Tensor, room: Room, scale: Tensor | None) -> Any:
        kept = None
        if is_index:
            t, kept = _label(t, ignore_index)
        else:
            t = _to(t, dtype)
        terms, slope, slope_t = body(_to(y, dtype), t, room)
        terms = _weigh(terms, scale, kept)
        factor = _factor(scale, divisor)
        slope, slope_t = _weigh(slope, factor, kept), _weigh(slope_t, factor, kept)
        if is_sum:
            terms = terms.sum()
        elif not is_elementwise:
            terms = terms.sum(1, keepdim=True)
        return terms, slope, slope_t

    if input.numel() <= BLOCK:
        loss, grad_input, grad_target = compute(input, target, [None] * rooms, scale)
        if grad_input is not None:
            grad_input = _to(grad_input, input.dtype)
        if grad_target is not None:
            grad_target = _to(grad_target, target.dtype)
    else:
        grad_input = _empty(input, input.dtype) if needs[0] else None
        grad_target = _empty(target, target.dtype) if needs[1] else None
        losses = None
        if not is_sum:
            losses = _empty(input if is_elementwise else input[:, :1], dtype)
        in_place = int(grad_input is not None and grad_input.dtype == dtype)
        scratch: list[Tensor] = []
        sums = []
        for y, t, grad_y, grad_t, part, factor in _blocks(
            input, target, grad_input, grad_target, losses, scale
        ):
            scratch = scratch or [torch.empty_like(y, dtype=dtype) for _ in range(rooms - in_place)]
            # The last block can be smaller than the first.
            room = [rest.view(-1)[: y.numel()].view(y.shape) for rest in scratch]
            if in_place:
                room.append(grad_y)
            terms, slope, slope_t = compute(y, t, room, factor)
            if part is None:
                sums.append(terms)
            else:
                part.copy_(terms)
            if grad_y is not None and slope is not grad_y:
                grad_y.copy_(slope)
            if grad_t is not None:
                grad_t.copy_(slope_t)
        loss = torch.stack(sums).sum(dtype=torch.float64) if losses is None else losses
    return Result(_to(_divided(loss, divisor), dtype), grad_input, grad_target)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-D tensor: a Python number in its place would be made into one at every call."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _label(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Class indices that are safe to gather with, and which samples are kept."""
    label = _to(target, torch.int64)
    if ignore_index is None:
        return label, None
    kept = label != ignore_index
    return label.where(kept, 0), kept


def _factor(scale: Tensor | None, divisor: Tensor | float) -> Tensor | float | None:
    """What the slopes of a loss are to be multiplied by, if by anything."""
    if scale is not None:
        return scale / divisor
    return None if isinstance(divisor, int) and divisor == 1 else 1 / divisor


def _divided(loss: Tensor, divisor: Tensor | float) -> Tensor:
    return loss if isinstance(divisor, int) and divisor == 1 else loss / divisor


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A small input notices each call into torch, this one too when there is nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _weigh(value: Tensor | None, factor: Tensor | float | None, kept: Tensor | None) -> Any:
    """Applies, in place, what is known of each sample."""
    if value is not None:
        if kept is not None:
            value.masked_fill_(~kept, 0)
        if factor is not None:
            value.mul_(factor)
    return value


def _blocks(input: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Views of the same block of all tensors, which have about `BLOCK` elements of the input each.

    A block is whole rows of classes: of several `outer`, or of a part of `inner`. What is no tensor
    comes with every block.
    """
    # Other dtypes need room for float64, or for their values in float32.
    size = BLOCK if input.dtype == torch.float32 else BLOCK // 2
    row = input[0].numel()
    outer = max(size // row, 1)
    inner = max(size // input.shape[1], 1)

    def split(value: Tensor) -> Iterator[Tensor]:
        parts = value.split(outer)
        if row <= size or value.dim() == 2:
            return iter(parts)
        return (block for part in parts for block in part.split(inner, 2))

    values = (split(v) if isinstance(v, Tensor) else repeat(v) for v in (input, *others))
    return zip(*values, strict=False)  # What is repeated has no end.


# The C library maps fresh memory for every tensor of this many bytes, and the kernel enters each
# page of it at first touch. In pages of 4 kB that takes longer than all arithmetic here.
FRESH = 2**25
HUGE_PAGE = 2**21
# The advice, and libc's function to give it; both are there on Linux only.
HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_advise: Callable[..., int] | None = (
    None if HUGE_PAGES is None else getattr(ctypes.CDLL(None), "madvise", None)
)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory shaped like a tensor; fresh memory in huge pages, where Linux grants them.

    PyTorch's own allocator asks for them too, for all tensors, under THP_MEM_ALLOC_ENABLE=1. The
    advice changes no value, and where it is not taken nothing is lost but time.
    """
    tensor = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    if _advise is not None and tensor.nbytes >= FRESH:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        _advise(ctypes.c_void_p(start), ctypes.c_size_t(length), HUGE_PAGES)
    return tensor


def _softmax(x: Tensor, *, is_log: bool, out: Tensor | None) -> Tensor:
    """torch's softmax or its logarithm over dimension 1."""
    function = torch.log_softmax if is_log else torch.softmax
    return function(x, 1, out=out)
