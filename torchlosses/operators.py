"""The loss of a linear layer as an operator of torch, for compiled graphs.

A graph can then hold neither all logits nor one chunk after the other. This is imported when the
first is compiled, since it imports the compiler.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from torchlosses import checks, formulas, fused, linear
from torchlosses.formulas import Call, Classes


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
    return (
        not formulas.is_exporting()
        and not checks.is_transformed()
        and fused.fits(call, input, target, weight, sample_weight)
        and type(linear_weight) in checks.PLAIN
        and (linear_bias is None or type(linear_bias) in checks.PLAIN)
        and linear_weight.dtype in fused.DTYPES
        and linear_weight.shape[0] > 0
        and _has_kernels(input.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return fused.kernels_of(device) is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_one_class(dim: int) -> None:
    """Warns while a graph is compiled, which can hold no warning."""
    checks.warn_of_one_class(dim)


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
    numbers = None
    if formulas.is_symbolic(call.delta) or formulas.is_symbolic(call.label_smoothing):
        # A number of an operator is compiled in, and a tensor is not.
        numbers = torch.stack([formulas.scalar(call.delta), formulas.scalar(call.label_smoothing)])
        call = call._replace(delta=0.0, label_smoothing=0.0)
    options = (needs, waits, dtype, *call[1:])
    loss: Tensor = _operator(*layer, weight, sample_weight, numbers, None, *options)[0]
    return loss


@torch.library.custom_op("torchlosses::linear_cross_entropy_error", mutates_args=())
def _operator(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    numbers: Tensor | None,
    upstream: Tensor | None,
    needs: list[bool],
    waits: bool,
    product_dtype: torch.dtype,
    is_index: bool,
    dim: int,
    reduction: str,
    ignore_index: int,
    dtype: torch.dtype,
    delta: float,
    label_smoothing: float,
) -> list[Tensor]:
    """The loss, and the gradients that are needed and do not wait for that of upstream.

    `numbers` are δ and the smoothing of a graph for many, in place of those by themselves.
    """
    if numbers is not None:
        delta, label_smoothing = numbers.tolist()
    call = Call("logits", is_index, dim, reduction, ignore_index, dtype, delta, label_smoothing)
    kernels = fused.kernels_of(input.device)
    if kernels is not None:
        try:
            results = linear.Chunks(kernels, product_dtype).compute(
                call, input, linear_weight, linear_bias, target, weight, sample_weight,
                (False,) * 4 if waits and upstream is None else needs, upstream,
            )  # fmt: skip
            return [result for result in results if result is not None]
        except fused.KernelError as error:
            fused.give_up(input.device, error)
    raise RuntimeError(  # Within an operator there is no autograd, and so no gradient by a formula.
        f"a kernel of torchlosses has failed on {input.device}, and this graph was compiled for "
        f"it; torch.compiler.reset(), and compile it again: it is then compiled for the formula"
    )


@_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, (*_, upstream, needs, waits, _), options = arguments[:4], arguments[4:11], arguments[11:]
    call, input = Call("logits", *options), layer[0]
    loss = input.new_empty(input.shape[:-1] if call.reduction == "none" else (), dtype=call.dtype)
    if waits and upstream is None:
        return [loss]
    return [loss, *(t.new_empty(t.shape) for t, needed in zip(layer, needs, strict=True) if needed)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, (_, ctx.needs, ctx.waits, ctx.product_dtype, *ctx.options) = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *(() if ctx.waits else output[1:]))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    needs, arguments, gradients = ctx.needs, ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    layer: list[Tensor | None]
    call = Call("logits", *ctx.options)
    if torch.is_grad_enabled():  # To be differentiated again.
        formula = functools.partial(linear.formula, ctx.product_dtype)
        *arguments, numbers = arguments
        if numbers is not None:
            delta, smoothing = numbers.tolist()
            call = call._replace(delta=delta, label_smoothing=smoothing)
        layer = fused.by_formula(formula, call, arguments, needs, grads[0])
    else:
        if ctx.waits:
            options = (needs, True, ctx.product_dtype, *ctx.options)
            _, *gradients = _operator(*arguments, grads[0], *options)
        else:
            gradients = [gradient * grads[0] for gradient in gradients]
            if needs[0] and call.is_index:  # 0 times what is not finite is NaN.
                kept: Any = Classes(arguments[3], arguments[1].shape[0], call.ignore_index).kept
                gradients[0] = gradients[0].where(kept.unsqueeze(-1), 0)
        remaining = iter(gradients)
        layer = [next(remaining) if needed else None for needed in needs]
    return (*layer, *[None] * (7 + len(ctx.options)))


_operator.register_autograd(_backward, setup_context=_save)
