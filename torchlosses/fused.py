"""Loss and gradient in one pass over the data, wherever a kernel serves the call.

The formula stays the truth: whatever autograd asks beyond one first derivative is answered by it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from torchlosses.checks import Classes
from torchlosses.kernels import cpu

Formula = Callable[[Tensor, Tensor], Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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


@functools.cache
def _find_triton(device: torch.device) -> ModuleType | None:
    """Imported for the first CUDA tensor: that takes a second, and not every build has Triton."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # Nothing is compiled for either in the tests.
    try:
        from torchlosses.kernels import triton
    except ImportError:
        return None
    try:  # Triton builds its launcher with the C compiler of the machine, if there is one.
        triton.rescale(torch.ones(1, device=device), torch.ones((), device=device))
    except Exception as error:
        warnings.warn(
            f"torchlosses is slower on {device} than it could be, for Triton does not work there: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    return triton


# What finds the kernels of each kind of device; the formulas serve all others.
KERNELS: dict[str, Callable[[torch.device], ModuleType | None]] = {
    "cpu": lambda device: cpu,
    "cuda": _find_triton,
}


def find_kernels(input: Tensor, target: Tensor, *weights: Tensor | None) -> ModuleType | None:
    """The kernels that serve a call, if any do.

    They serve plain tensors, contiguous, with gradients for `input` and `target` alone, in eager
    autograd that nothing else looks on at: no compiler, no tracer, no transform, no tangent.
    """
    if (
        torch.compiler.is_compiling()  # First: a size is a guard of the compiled graph.
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or type(input) not in PLAIN
        or type(target) not in PLAIN
        or input.dtype not in DTYPES
        or (target.is_floating_point() and target.dtype not in DTYPES)
        or not input.is_contiguous()
        or not target.is_contiguous()
        or input.numel() == 0
        or input.dim() == 0
        or _is_transformed()
        or _count_modes()
        # Private; the public way is to unpack every tensor.
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return None
    for weight in weights:
        if weight is not None and weight.requires_grad:
            return None
    find = KERNELS.get(input.device.type)
    return None if find is None else find(input.device)


def run(
    kernels: ModuleType,
    kernel: Callable[..., Any],
    formula: Formula,
    input: Tensor,
    target: Tensor,
    dim: int,
    classes: Classes | None,
    weights: Tensor | None,
    divisor: Tensor | float,
    *,
    losses_shape: torch.Size | None,
    is_elementwise: bool,
    **options: Any,
) -> Tensor:
    """The loss by a kernel, in canonical arguments.

    `weights` broadcasts to the input; `losses_shape` is None for a sum; where the loss
    `is_elementwise`, an element has nothing to do with the others of its row.
    """
    shape: tuple[int, ...] = input.shape
    factors = None if weights is None else weights.expand(shape)
    if factors is None:
        is_flat = is_elementwise and len(shape) != 2
    else:  # One for each element makes it a sample of its own.
        is_flat = shape[dim] != 1 and factors.stride(dim) != 0
    if is_flat:
        shape = (input.numel(), 1)
    elif dim != 1 or len(shape) != 2:
        inner = input.shape[dim + 1 :].numel()
        shape = (input.shape[:dim].numel(), shape[dim], *(() if inner == 1 else (inner,)))
    samples = (shape[0], 1, *shape[2:])
    scale = None
    if factors is not None:
        scale = (factors if is_flat else factors.narrow(dim, 0, 1)).reshape(samples)
    options |= {
        "divisor": divisor,
        "ignore_index": None if classes is None else classes.ignore_index,
        "is_sum": losses_shape is None,
    }

    def call(
        input: Tensor, target: Tensor, needs: tuple[bool, bool], upstream: Tensor | None = None
    ) -> cpu.Result:
        factor = scale
        if upstream is not None:
            factor = (upstream if scale is None else scale * upstream).expand(samples)
        result: cpu.Result = kernel(
            _view(input, shape),
            _view(target, shape if classes is None else samples),
            scale=factor,
            needs=needs,
            **options,
        )
        return result

    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor = OnePass.apply(call, kernels.rescale, formula, input, target)
    else:
        loss = call(input, target, (False, False)).loss
    return loss if losses_shape is None else loss.view(losses_shape)


def _view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.view(shape)


class OnePass(Function):
    """A loss whose gradients are made together with it and handed over once.

    Those of float16 wait for the upstream gradient: what is too small for that dtype would be lost
    before a loss scaler's factor could lift it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., cpu.Result],
        rescale: Callable[[Tensor, Tensor], Tensor],
        formula: Formula,
        input: Tensor,
        target: Tensor,
    ) -> Tensor:
        ctx.waits = torch.float16 in (input.dtype, target.dtype)
        needs = (False, False) if ctx.waits else ctx.needs_input_grad[3:]
        loss, *ctx.gradients = call(input, target, needs)
        ctx.call, ctx.rescale, ctx.formula, ctx.shape = call, rescale, formula, input.shape
        ctx.save_for_backward(input, target)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        needs = ctx.needs_input_grad[3:]
        if (
            torch.is_grad_enabled()  # To be differentiated again.
            or torch.compiler.is_compiling()
            or not _has_memory(grad_loss)
            # No factor of a sample, as those that wait take it.
            or (ctx.waits and grad_loss.dim() > 0 and grad_loss.shape[1] != 1)
        ):
            return (None, None, None, *_by_formula(ctx, grad_loss, needs))
        if ctx.waits:
            _, *gradients = ctx.call(*ctx.saved_tensors, needs, grad_loss)
        else:
            if gradients is None:  # They are with whoever went backward first.
                _, *gradients = ctx.call(*ctx.saved_tensors, needs)
            gradients = [g if g is None else ctx.rescale(g, grad_loss) for g in gradients]
        return (None, None, None, *(g if g is None else _view(g, ctx.shape) for g in gradients))


def _has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to read: not in a batch of upstream gradients, nor in a trace."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _by_formula(ctx: Any, grad_loss: Tensor, needs: tuple[bool, bool]) -> Iterator[Tensor | None]:
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
