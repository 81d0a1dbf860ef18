"""Loss and gradient in one pass over the data, wherever a kernel serves the call.

The formula stays the truth: whatever autograd asks beyond one first derivative is answered by it.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from torchlosses import checks, formulas
from torchlosses.formulas import Call

# What kernels raise that no formula would mend: a class out of range, and memory that is not there.
OF_THE_CALLER = (IndexError, MemoryError, torch.OutOfMemoryError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _unknown() -> bool:
    """Stands for a detector that a version of torch does not have: the formula serves it."""
    return True


# Private, for want of a public twin: whether a transform of torch.func is on.
_is_transformed: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _unknown
)


class KernelError(Exception):
    """Has what a kernel has raised."""


class Kernels(NamedTuple):
    """The kernels of a device, whose errors are told from those of all that is around them."""

    module: Any

    def compute(self, *arguments: Any, **options: Any) -> Any:
        return _run(self.module.compute, *arguments, **options)

    def rescale(self, *arguments: Any) -> Any:
        return _run(self.module.rescale, *arguments)


def _run(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return kernel(*arguments, **options)
    except OF_THE_CALLER:
        raise
    except Exception as error:
        raise KernelError(error) from error


@functools.cache
def _find_cpu(_: torch.device) -> Kernels | None:
    try:
        from torchlosses.kernels import cpu
    except (ImportError, OSError, AttributeError) as error:
        warnings.warn(
            "torchlosses is slower on the CPU than it could be, for its extension is not there "
            f"({error}); install a C++ compiler, and the package again",
            stacklevel=2,
        )
        return None
    return Kernels(cpu)


@functools.cache
def _find_triton(device: torch.device) -> Kernels | None:
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
    return Kernels(triton)


# What finds the kernels of each kind of device; the formulas serve all others, and the devices
# whose kernels have failed.
KERNELS: dict[str, Callable[[torch.device], Kernels | None]] = {
    "cpu": _find_cpu,
    "cuda": _find_triton,
}
_failed: set[torch.device] = set()


def give_up(device: torch.device, error: KernelError) -> None:
    """Leaves a device to the formulas: a driver, a compiler or a GPU may refuse any kernel."""
    if device not in _failed:
        _failed.add(device)
        cause = error.args[0]
        warnings.warn(
            f"torchlosses is slower on {device} than it could be, for a kernel failed there: "
            f"{type(cause).__name__}: {cause}",
            stacklevel=5,
        )


def kernels_of(device: torch.device) -> Kernels | None:
    """The kernels of a device, if there are any and none has failed."""
    find = KERNELS.get(device.type)
    return None if find is None or device in _failed else find(device)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward mode is on."""
    # Private; the public way is to unpack every tensor.
    return _is_transformed() or getattr(forward_ad, "_current_level", 0) >= 0


def is_eager() -> bool:
    """Whether nothing but autograd's backward mode sees what runs."""
    return not (checks.is_traced() or is_transformed())


def fits(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> bool:
    """Whether kernels serve such a call, in whatever shape its tensors are.

    They serve plain tensors, with gradients for `input` and `target` alone. Whether a transform is
    on is the caller's to ask.
    """
    if (
        type(input) not in checks.PLAIN
        or type(target) not in checks.PLAIN
        or input.dtype not in DTYPES
        or (target.is_floating_point() and target.dtype not in DTYPES)
        or not call.is_plain_delta
    ):
        return False
    for other in (weight, sample_weight):
        if other is not None and (
            type(other) not in checks.PLAIN or (other.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return True


def find_kernels(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    *,
    is_known: bool = False,
) -> Kernels | None:
    """The kernels that serve a call in eager autograd, of tensors with numbers in them, if any.

    Of a known call, only what can differ between two calls with the same key is looked at.
    """
    if not is_known and (
        checks.is_traced()  # First: a size is a guard of the compiled graph.
        or not fits(call, input, target, weight, sample_weight)
    ):
        return None
    if (
        is_transformed()
        or input.numel() == 0
        or not (_is_dense(input) and _is_dense(target))
        or not (weight is None or _has_numbers(weight))
        or not (sample_weight is None or _has_numbers(sample_weight))
    ):
        return None
    return kernels_of(input.device)


def attempt(
    kernels: Any,
    formula: Callable[..., Tensor],
    waits: bool,
    learns: bool,
    call: Call,
    *arguments: Tensor | None,
) -> Tensor | None:
    """The loss by the kernels, or None where one fails; see `OnePass`."""
    loss: Tensor
    try:
        if learns:
            loss = OnePass.apply(kernels, formula, waits, call, *arguments)
        else:
            loss, *_ = kernels.compute(call, *arguments, (False,) * (len(arguments) - 2))
    except KernelError as error:
        input: Any = arguments[0]
        give_up(input.device, error)
        return None
    return loss


def compute(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    *,
    is_known: bool = False,
) -> Tensor:
    """The loss, by a kernel where one serves."""
    arguments = (input, target, weight, sample_weight)
    kernels = find_kernels(call, *arguments, is_known=is_known)
    if kernels is not None:
        learns = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
        half = torch.float16 in (input.dtype, target.dtype)
        waits = half or call.reduction == "none"
        loss = attempt(kernels, formulas.compute, waits, learns, call, *arguments)
        if loss is not None:
            return loss
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, input.shape[call.dim], call.ignore_index)
    return formulas.compute(call, *arguments, classes)


class OnePass(Function):
    """A loss whose gradients are made together with it and handed over once.

    Those that wait for the upstream gradient are made in backward: of float16, where what is too
    small for that dtype would be lost before a loss scaler's factor could lift it, and of losses
    that are not reduced, which are told apart by it. All that backward reads is saved, so that
    autograd sees what changes meanwhile, hooks see what is held, and nothing is held any longer.

    `kernels.compute` takes the call, the arguments and which of them need gradients, where the last
    two, the weights, never do; `formula` takes the call and the arguments; `waits` says which kind
    of gradient they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        formula: Callable[..., Tensor],
        waits: bool,
        call: Call,
        *arguments: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.formula, ctx.waits, ctx.call = kernels, formula, waits, call
        ctx.needs = needs = ctx.needs_input_grad[4:-2]
        if waits:
            needs = (False,) * len(needs)
        loss: Tensor
        loss, *gradients = kernels.compute(call, *arguments, needs)
        ctx.is_made = not waits
        ctx.save_for_backward(*arguments, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call, needs, saved = ctx.call, ctx.needs, ctx.saved_tensors
        grad_loss = grad_loss.resolve_neg()  # As that of the imaginary part of a conjugate.
        arguments, gradients = saved[: len(needs) + 2], saved[len(needs) + 2 :]
        if (
            torch.is_grad_enabled()  # To be differentiated again.
            or torch.compiler.is_compiling()
            or not _has_memory(grad_loss)
        ):
            gradients = by_formula(ctx.formula, call, arguments, needs, grad_loss)
        else:
            try:
                gradients = _by_kernel(ctx, arguments, gradients, grad_loss)
            except KernelError as error:
                give_up(grad_loss.device, error)
                gradients = by_formula(ctx.formula, call, arguments, needs, grad_loss)
        return None, None, None, None, *gradients, None, None


def _by_kernel(
    ctx: Any, arguments: list[Any], gradients: list[Tensor | None], grad_loss: Tensor
) -> list[Tensor | None]:
    if ctx.waits:
        return list(ctx.kernels.compute(ctx.call, *arguments, ctx.needs, grad_loss)[1:])
    if ctx.is_made:
        # Scaled in place, and the caller's from here on; neither is a change to what is saved.
        gradients = [None if gradient is None else gradient.data for gradient in gradients]
        ctx.is_made = False
    else:
        gradients = ctx.kernels.compute(ctx.call, *arguments, ctx.needs)[1:]
    rescale = ctx.kernels.rescale
    return [None if gradient is None else rescale(gradient, grad_loss) for gradient in gradients]


def _is_dense(tensor: Tensor) -> bool:
    """Whether it is as large as it looks, so that a copy of other strides costs no more memory."""
    return _has_numbers(tensor) and (tensor.is_contiguous() or 0 not in tensor.stride())


def _has_numbers(tensor: Tensor) -> bool:
    """Whether memory holds its numbers, and not their opposites."""
    return not tensor.is_neg() and _has_memory(tensor)


def _has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to read: not in a batch of gradients, a trace, or mere zeros."""
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def by_formula(
    formula: Callable[..., Tensor],
    call: Call,
    arguments: Sequence[Any],
    needs: Sequence[bool],
    grad_loss: Tensor,
) -> list[Tensor | None]:
    """The gradients that are needed, differentiable where autograd asks for that.

    They are those by fresh nodes on top of the arguments: a target that is made from the input is
    an argument of its own here, and what hangs on an argument is no business of this derivative.
    """
    is_differentiable = torch.is_grad_enabled()
    fresh = list(arguments)
    with torch.enable_grad():
        for i, needed in enumerate(needs):
            if is_differentiable and needed:
                fresh[i] = arguments[i].view_as(arguments[i])
            elif not is_differentiable and arguments[i] is not None:
                fresh[i] = arguments[i].detach().requires_grad_(needed)
        loss = formula(call, *fresh)
    wanted = [argument for argument, needed in zip(fresh, needs, strict=False) if needed]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=is_differentiable))
    return [next(gradients) if needed else None for needed in needs]
