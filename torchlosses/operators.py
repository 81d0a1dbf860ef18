"""The loss of a linear layer as an operator of torch, for compiled graphs.

A graph can then hold neither all logits nor one chunk after the other. This is imported when the
first is compiled, since it imports the compiler.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchlosses import checks, fused, linear
from torchlosses.formulas import Call


def serves(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> bool:
    """Whether the operator stands for the call; an exported graph goes where it may be unknown."""
    arguments = (input, linear_weight, linear_bias, target, weight, sample_weight)
    return (
        not torch.compiler.is_exporting()
        and not fused.is_transformed()
        and all(t is None or type(t) in checks.PLAIN for t in arguments)
        and call.is_plain_delta
        and all(t.dtype in fused.DTYPES for t in (input, linear_weight))
        and (call.is_index or not target.is_floating_point() or target.dtype in fused.DTYPES)
        and linear_weight.shape[0] > 0
        and not any(t is not None and t.requires_grad for t in (weight, sample_weight))
        and _has_kernels(input.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return fused.kernels_of(device) is not None


def compute(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss, by the operator."""
    dtype = linear.product_dtype(input)
    layer = (input, linear_weight, linear_bias, target)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in layer]
    waits = linear.waits_for_upstream(call, dtype, [t for t in layer if t is not None])
    loss: Tensor = _operator(
        *layer, weight, sample_weight, None, needs, waits, dtype, call.is_index, call.reduction,
        call.ignore_index, call.dtype, call.delta, call.label_smoothing,
    )[0]  # fmt: skip
    return loss


@torch.library.custom_op("torchlosses::linear_cross_entropy_error", mutates_args=())
def _operator(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    upstream: Tensor | None,
    needs: list[bool],
    waits: bool,
    product_dtype: torch.dtype,
    is_index: bool,
    reduction: str,
    ignore_index: int,
    dtype: torch.dtype,
    delta: float,
    label_smoothing: float,
) -> list[Tensor]:
    """The loss, and the gradients that are needed and do not wait for that of upstream."""
    call = Call(
        "logits", is_index, input.dim() - 1, reduction, ignore_index, dtype, delta, label_smoothing
    )
    results = linear.Chunks(fused.kernels_of(input.device), product_dtype).compute(
        call, input, linear_weight, linear_bias, target, weight, sample_weight,
        (False,) * 4 if waits and upstream is None else needs, upstream,
    )  # fmt: skip
    return [result for result in results if result is not None]


@_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, (upstream, needs, waits, *_), reduction, dtype = (
        arguments[:4], arguments[6:9], arguments[11], arguments[13],
    )  # fmt: skip
    input = layer[0]
    loss = input.new_empty(input.shape[:-1] if reduction == "none" else (), dtype=dtype)
    if waits and upstream is None:
        return [loss]
    return [loss, *(t.new_empty(t.shape) for t, needed in zip(layer, needs, strict=True) if needed)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, needs, waits, *ctx.options = inputs[6:]
    ctx.needs, ctx.waits = needs, waits
    ctx.save_for_backward(*(inputs[:6] if waits else output[1:]))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved: Any = ctx.saved_tensors
    if ctx.waits:
        _, *gradients = _operator(*saved, grads[0], ctx.needs, True, *ctx.options)
    else:
        gradients = [gradient * grads[0] for gradient in saved]
    remaining: Iterator[Tensor] = iter(gradients)
    layer = [next(remaining) if needed else None for needed in ctx.needs]
    return (*layer, *[None] * 12)


_operator.register_autograd(_backward, setup_context=_save)
