"""Loss and gradient in one pass over the data, wherever a kernel serves the call.

The formula stays the truth: whatever autograd asks beyond one first derivative is answered by it.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from torchlosses import checks
from torchlosses.checks import Classes
from torchlosses.kernels import cpu

Formula = Callable[[Tensor, Tensor], Tensor]

# The kernels of each kind of device; the formulas serve all others.
KERNELS: dict[str, ModuleType] = {"cpu": cpu}
# Elements of the input up to which it is calls that cost, not memory: the formula has fewer of them
# if no gradient is wanted.
SMALL = 2**13
# float16 is left to the formula: what is too small for it would be lost before a loss scaler's
# factor, which is the upstream gradient, could lift it.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PLAIN = (Tensor, nn.Parameter)


def _unknown() -> bool:
    """Stands for a detector that a version of torch does not have: the formula serves it."""
    return True


# Private, for want of public twins: whether a transform of torch.func is on, and whether a mode
# (a tracer, fake tensors) sees every operation.
_is_transformed: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _unknown
)
_count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)


def find_kernels(input: Tensor, target: Tensor, *weights: Tensor | None) -> ModuleType | None:
    """The kernels that serve a call, if any do.

    They serve plain tensors, contiguous, with gradients for `input` and `target` alone, in eager
    autograd that nothing else looks on at: no compiler, no tracer, no transform, no tangent.
    """
    if (
        torch.compiler.is_compiling()  # First: a size is a guard of the compiled graph.
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or input.numel() < (1 if wants_gradient(input, target) else SMALL + 1)
        or input.dim() == 0
        or type(input) not in PLAIN
        or type(target) not in PLAIN
        or input.dtype not in DTYPES
        or (target.is_floating_point() and target.dtype not in DTYPES)
        or not input.is_contiguous()
        or not target.is_contiguous()
        or _is_transformed()
        or _count_modes()
        # Private; the public way is to unpack every tensor.
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return None
    for weight in weights:
        if weight is not None and weight.requires_grad:
            return None
    return KERNELS.get(input.device.type)


def wants_gradient(input: Tensor, target: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)


def run(
    kernel: Callable[..., Any],
    formula: Formula,
    input: Tensor,
    target: Tensor,
    dim: int,
    *,
    classes: Classes | None,
    weights: Tensor | None,
    divisor: Tensor | float,
    losses_shape: Sequence[int] | None,
    is_elementwise: bool,
    **options: Any,
) -> Tensor:
    """The loss by a kernel of canonical arguments, or by the formula if they cannot be made.

    `weights` broadcasts to the input; `losses_shape` is None for a sum.
    """
    if isinstance(divisor, Tensor) and not divisor:
        return formula(input, target)  # It knows what a mean over nothing is.
    scale = 1 / divisor if weights is None else weights / divisor
    shape: tuple[int, ...] = input.shape
    if dim != 1 or input.dim() != 2:
        inner = input.shape[dim + 1 :].numel()
        shape = (input.shape[:dim].numel(), input.shape[dim], *(() if inner == 1 else (inner,)))
    samples = (shape[0], 1, *shape[2:])
    if isinstance(scale, Tensor):
        by_element = scale.expand(input.shape)
        if input.shape[dim] != 1 and by_element.stride(dim):
            return formula(input, target)  # One factor per element is none per sample.
        scale = by_element.narrow(dim, 0, 1).reshape(samples)
    elif is_elementwise and classes is None and len(shape) != 2:
        shape = (input.numel(), 1)

    def call(input: Tensor, target: Tensor, needs: tuple[bool, bool]) -> cpu.Result:
        result: cpu.Result = kernel(
            _view(input, shape),
            _view(target, shape) if classes is None else classes.label.reshape(samples),
            scale=scale,
            kept=None if classes is None or classes.kept is None else classes.kept.reshape(samples),
            is_sum=losses_shape is None,
            needs=needs,
            **options,
        )
        return result

    if wants_gradient(input, target):
        loss: Tensor = OnePass.apply(call, formula, input, target)
    else:
        loss = call(input, target, (False, False)).loss
    return loss if losses_shape is None else loss.view(losses_shape)


def _view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.view(shape)


class OnePass(Function):
    """A loss whose gradients are made together with it and handed over once."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[[Tensor, Tensor, tuple[bool, bool]], cpu.Result],
        formula: Formula,
        input: Tensor,
        target: Tensor,
    ) -> Tensor:
        loss, *gradients = call(input, target, ctx.needs_input_grad[2:])
        ctx.call, ctx.formula, ctx.gradients, ctx.shape = call, formula, gradients, input.shape
        ctx.save_for_backward(input, target)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            if gradients is None:  # They are with whoever went backward first.
                _, *gradients = ctx.call(*ctx.saved_tensors, ctx.needs_input_grad[2:])
            if ctx.shape.numel() <= SMALL:  # To look at its value takes longer than to multiply.
                is_one: bool | None = True
                gradients = [g if g is None else g * grad_loss for g in gradients]
            else:
                is_one = checks.truth((grad_loss == 1).all())  # None in a batch.
            if is_one is False:
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(grad_loss)
            if is_one is not None:
                return (None, None, *(g if g is None else _view(g, ctx.shape) for g in gradients))
        # To be differentiated again, traced or batched.
        return (None, None, *_by_formula(ctx, grad_loss))


def _by_formula(ctx: Any, grad_loss: Tensor) -> Iterator[Tensor | None]:
    needs = ctx.needs_input_grad[2:]
    arguments = ctx.saved_tensors
    is_differentiable = torch.is_grad_enabled()
    if not is_differentiable:
        arguments = [
            argument.detach().requires_grad_(needed)
            for argument, needed in zip(arguments, needs, strict=True)
        ]
    with torch.enable_grad():
        loss = ctx.formula(*arguments)
    wanted = [argument for argument, needed in zip(arguments, needs, strict=True) if needed]
    gradients = torch.autograd.grad(
        loss, wanted, grad_loss.reshape(loss.shape), create_graph=is_differentiable
    )
    remaining = iter(gradients)
    return (next(remaining) if needed else None for needed in needs)
