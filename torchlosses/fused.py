"""Loss and gradient in one pass over the data, wherever a kernel serves the call.

The formula stays the truth: whatever autograd asks beyond one first derivative is answered by it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from torchlosses import checks, formulas
from torchlosses.formulas import Call, Classes

# What kernels raise that no formula would mend; the handler of a signal raises a TimeoutError.
OF_THE_CALLER = (MemoryError, torch.OutOfMemoryError, TimeoutError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class KernelError(Exception):
    """Has what a kernel has raised."""


class Kernels(Protocol):
    """The kernels of a device, a module or what is like one."""

    def compute(self, call: Call, /, *arguments: Any) -> Any:
        """The loss and its gradients: by arguments, needs and, if given, that from upstream.

        Needs say which arguments have a gradient; the last two, the weights, never do. A class that
        is none makes NaN of its sample; where the kernels see it and are to complain, it is an
        error.
        """

    def rescale(
        self, gradients: Sequence[Tensor | None], grad_loss: Tensor, call: Call, target: Tensor, /
    ) -> Sequence[Tensor | None] | None:
        """Gradients times that of their loss, in place, as tensors of their own.

        So what was saved counts as unchanged. Of the first, the rows that the target ignores stay
        0, though 0 times a factor that is not finite is NaN; None, and nothing done, where the
        kernels see such a factor and leave it to `compute`.
        """


class Guarded(NamedTuple):
    """Kernels that may fail, and whose errors are told from those of all that is around them.

    Those of the CPU do not: what they raise is for the caller.
    """

    kernels: Any

    @property
    def LOSSES(self) -> Any:  # noqa: N802
        return self.kernels.LOSSES

    def compute(self, *arguments: Any) -> Any:
        return _run(self.kernels.compute, *arguments)

    def rescale(self, *arguments: Any) -> Any:
        return _run(self.kernels.rescale, *arguments)


def _run(kernel: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return kernel(*arguments)
    except OF_THE_CALLER:
        raise
    except Exception as error:
        raise KernelError(error) from error


@functools.cache
def _load_extension() -> Any | None:
    """The module of the CPU's kernels and of known calls, if it is there.

    Imported for the first eager call: a mode that was on before would make its tensors.
    """
    try:
        from torchlosses.kernels import cpu
    except ImportError as error:
        checks.warn(
            "torchlosses is slower than it could be, for its extension is not there "
            f"({error}); install a C++ compiler, and the package again"
        )
        return None
    return cpu


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
        triton.rescale([torch.ones(1, device=device)], torch.ones((), device=device))
    except OF_THE_CALLER:
        raise
    except Exception as error:
        checks.warn(
            f"torchlosses is slower on {device} than it could be, for Triton does not work there: "
            f"{type(error).__name__}: {error}"
        )
        return None
    return Guarded(triton)


# What finds the kernels of each kind of device, which list the LOSSES that they know; the formulas
# serve all others, and the devices whose kernels have failed.
KERNELS: dict[str, Callable[[torch.device], Any]] = {
    "cpu": lambda device: _load_extension(),
    "cuda": _find_triton,
}
_failed: set[torch.device] = set()


def give_up(device: torch.device, error: KernelError) -> None:
    """Leaves a device to the formulas: a driver, a compiler or a GPU may refuse any kernel."""
    _known.clear()
    if device not in _failed:
        _failed.add(device)
        cause = error.args[0]
        checks.warn(
            f"torchlosses is slower on {device} than it could be, for a kernel failed there: "
            f"{type(cause).__name__}: {cause}"
        )


def kernels_of(device: torch.device, kind: str) -> Kernels | None:
    """The kernels of a device for a kind of loss, if there are any and none has failed."""
    find = KERNELS.get(device.type)
    kernels = None if find is None or device in _failed else find(device)
    return kernels if kernels is not None and kind in kernels.LOSSES else None


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


# How a loss is computed: by which kernels, what call it is, the formula for what they do not do,
# and whether gradients wait for that from upstream.
Way = tuple[Kernels, Call, Callable[..., Tensor], bool]


def find_kernels(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Kernels | None:
    """The kernels that serve a call in eager autograd, of tensors with numbers in them, if any."""
    if (
        checks.is_traced()  # First: a size is a guard of the compiled graph.
        or not fits(call, input, target, weight, sample_weight)
        or checks.is_transformed()
        or input.numel() == 0
        or not (_is_dense(input) and _is_dense(target))
        or not (weight is None or _has_numbers(weight))
        or not (sample_weight is None or _has_numbers(sample_weight))
    ):
        return None
    return kernels_of(input.device, call.kind)


# The ways of calls, by what decides them: a training loop asks the same of each batch. Beside a way
# stands the mapping that its kernels are of.
_known: dict[tuple[Any, ...], tuple[Any, Way]] = {}
MOST_KNOWN = 1024


def compute_known(
    form: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor | None:
    """The loss by kernels, if such a call is known, and needs no check any more."""
    if torch.compiler.is_compiling() or not _known:
        return None
    extension: Any = _load_extension()
    loss: Tensor | None
    try:
        loss = extension.serve(
            _known, KERNELS, OnePass.apply, form, input, target, weight, sample_weight
        )
    except KernelError as error:
        give_up(input.device, error)
        return None
    return loss


def attempt(way: Way, learns: bool, *arguments: Tensor | None) -> Tensor | None:
    """The loss by kernels, or None where one fails; see `OnePass`."""
    loss: Tensor
    try:
        if learns:
            loss = OnePass.apply(way, *arguments)
        else:
            kernels, call, _, _ = way
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
    form: tuple[Any, ...] | None = None,
) -> Tensor:
    """The loss, by a kernel where one serves, for calls of that form to come too."""
    arguments = (input, target, weight, sample_weight)
    if torch.compiler.is_compiling() and serves_graph(call, *arguments):
        return LOSS(call, (), *arguments)
    kernels = find_kernels(call, *arguments)
    if kernels is not None:
        learns = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
        waits = waits_for_upstream(call, input.dtype, target.dtype)
        way = (kernels, call, formulas.compute, waits)
        extension = _load_extension()
        key = None if form is None or extension is None else extension.find_key(form, *arguments)
        if key is not None:
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            _known[key] = (KERNELS, way)
        loss = attempt(way, learns, *arguments)
        if loss is not None:
            return loss
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, input.shape[call.dim], call.ignore_index)
    return formulas.compute(call, *arguments, classes)


def waits_for_upstream(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether the gradients of tensors of these dtypes are made in backward; see `OnePass`."""
    return call.reduction == "none" or torch.float16 in dtypes


class OnePass(Function):
    """A loss whose gradients are made together with it and handed over once.

    Those that wait for the upstream gradient are made in backward: of float16, where what is too
    small for that dtype would be lost before a loss scaler's factor could lift it, and of losses
    that are not reduced, which are told apart by it. Where hooks get what is saved, gradients are
    made in backward too: the memory that a hook gives back is not ours to write to, or hand over.
    All that backward reads is saved, so that autograd sees what changes meanwhile, hooks see what
    is held, and nothing is held any longer.
    """

    @staticmethod
    def forward(ctx: Any, way: Way, *arguments: Tensor | None) -> Tensor:
        kernels, call, _, waits = ctx.way = way
        needs = ctx.needs_input_grad[1:-2]
        ctx.is_made = not (waits or checks.find_saving_hooks(True))
        if not ctx.is_made:
            needs = (False,) * len(needs)
        loss: Tensor
        loss, *gradients = kernels.compute(call, *arguments, needs)
        ctx.save_for_backward(*arguments, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        kernels, call, formula, waits = ctx.way
        saved = ctx.saved_tensors
        count = len(saved) // 2 + 1  # Of the arguments: two of them have no gradient.
        if not (
            torch.is_grad_enabled()  # To be differentiated again.
            or checks.is_traced()
            or not _has_memory(grad_loss)
        ):
            try:
                if not waits:
                    gradients = saved[count:]
                    if not ctx.is_made:
                        needs = ctx.needs_input_grad[1:-2]
                        _, *gradients = kernels.compute(call, *saved[:count], needs)
                    ctx.is_made = False  # The caller's from here on.
                    gradients = kernels.rescale(gradients, grad_loss, call, saved[count - 3])
                    if gradients is not None:
                        return None, *gradients, None, None
                needs = ctx.needs_input_grad[1:-2]
                upstream = grad_loss.resolve_neg()
                _, *gradients = kernels.compute(call, *saved[:count], needs, upstream)
                return None, *gradients, None, None
            except KernelError as error:
                give_up(grad_loss.device, error)
        needs = ctx.needs_input_grad[1:-2]
        return None, *by_formula(formula, call, saved[:count], needs, grad_loss), None, None


def _show_saved(node: Any) -> Any:
    """What a node saves, for hooks to be set on: gradients are made again in backward then."""
    node.is_made = False
    return super(_nodes, node)._raw_saved_tensors


_nodes: Any = getattr(OnePass, "_backward_cls", None)  # Private: their class.
if _nodes is None:
    checks.find_saving_hooks = bool  # There may be some.
else:
    _nodes._raw_saved_tensors = property(_show_saved)


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


# ---- In compiled graphs


def serves_graph(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    *others: Tensor | None,
) -> bool:
    """Whether an operator stands for the call in a graph that is being compiled.

    An exported graph has operations of torch alone: it may run where this package is not there.
    """
    return (
        not formulas.is_exporting()
        and not checks.is_transformed()
        and fits(call, input, target, weight, sample_weight)
        and all(t is None or (type(t) in checks.PLAIN and t.dtype in DTYPES) for t in others)
        and _has_kernels(input.device, call.kind)
    )


def _has_kernels(device: torch.device, kind: str) -> bool:
    return kernels_of(device, kind) is not None


# What torch.compiler.assume_constant_result does, but for the import of the compiler: the answer,
# which takes an import and a look at files, is that of when the graph is compiled.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]

# torch caches a compiled graph with the backward of its operators, and knows them by their names:
# one whose backward becomes another needs another name.
LIBRARY = torch.library.Library("torchlosses", "DEF")
CALL = (
    "str kind, bool is_index, int dim, str reduction, int ignore_index, ScalarType dtype, "
    "float delta, float label_smoothing"
)


# The upstream gradient again, as what depends on tensors: a compiler that has no second derivative
# says so only if its backward reads what that derivative is by, and a gradient that is there
# already reads nothing.
LIBRARY.define("depending(Tensor upstream, Tensor[] tensors) -> Tensor")
LIBRARY.impl("depending", lambda upstream, tensors: upstream.clone(), "CompositeExplicitAutograd")


class Operator:
    """A loss and its gradients as one operator of torch, by the kernels of eager calls.

    Its first tensors are `layer`, which have gradients, the target last; then come weights. It
    gives the loss, and gradients that `needs` asks for: at once, or, where they are late, from the
    backward of the operator, which runs it again, times that of upstream. `numbers` are δ and ε of
    a graph for many, since a graph is compiled for each number of an operator. `bind` makes of the
    kernels of a device what computes the loss, and `formula` is what that stands for; both take
    `extra`.
    """

    def __init__(
        self,
        name: str,
        layer: Sequence[str],
        extra: Sequence[str],
        bind: Callable[..., Any],
        formula: Callable[..., Callable[..., Tensor]],
    ) -> None:
        tensors = [*layer, "Tensor? weight", "Tensor? sample_weight"]
        self.count, self.tensors, self.extra = len(layer), len(tensors), len(extra)
        self.bind, self.formula = bind, formula
        options = ["Tensor? numbers", "Tensor? upstream", "bool[] needs", "bool is_late"]
        LIBRARY.define(f"{name}({', '.join([*tensors, *options, *extra, CALL])}) -> Tensor[]")
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self._run, key)
        qualified = f"torchlosses::{name}"
        torch.library.register_fake(qualified, self._fake, lib=LIBRARY)
        torch.library.register_autograd(
            qualified, self._backward, setup_context=self._save, lib=LIBRARY
        )
        self.overload = getattr(torch.ops.torchlosses, name).default

    def __call__(self, call: Call, extra: Sequence[Any], *tensors: Any) -> Tensor:
        """The loss, for a graph to hold."""
        layer = tensors[: self.count]
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in layer]
        dtypes = [t.dtype for t in layer if t is not None]
        is_late = waits_for_upstream(call, *extra, *dtypes)
        numbers = None
        if formulas.is_symbolic(call.delta) or formulas.is_symbolic(call.label_smoothing):
            numbers = torch.stack(
                [formulas.scalar(call.delta), formulas.scalar(call.label_smoothing)]
            )
            call = call._replace(delta=0.0, label_smoothing=0.0)
        loss: Tensor = self.overload(*tensors, numbers, None, needs, is_late, *extra, *call)[0]
        return loss

    def _split(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Tensors, numbers, upstream, needs, is_late, extra and call of the arguments."""
        tensors, options = inputs[: self.tensors], inputs[self.tensors :]
        numbers, upstream, needs, is_late, *rest = options
        call = Call(*rest[self.extra :])
        return tensors, numbers, upstream, needs, is_late, rest[: self.extra], call

    def _run(self, *inputs: Any) -> list[Tensor]:
        tensors, numbers, upstream, needs, is_late, extra, call = self._split(inputs)
        call = _with_numbers(call, numbers)
        input, device = tensors[0], tensors[0].device
        if is_late and upstream is None:
            needs = (False,) * self.count
        if input.numel() == 0:  # Nothing to launch a kernel for: a sum, and no slopes.
            loss = self.formula(*extra)(call, *tensors)
            layer = zip(tensors[: self.count], needs, strict=True)
            return [loss, *(t.new_zeros(t.shape) for t, needed in layer if needed)]
        kernels = kernels_of(device, call.kind)
        if kernels is not None:
            try:
                results = self.bind(kernels, *extra)(call, *tensors, tuple(needs), upstream)
                return [result for result in results if result is not None]
            except KernelError as error:
                give_up(device, error)
        # Within an operator there is no autograd, and so no gradient by a formula.
        raise RuntimeError(
            f"a kernel of torchlosses has failed on {device}, and this graph was compiled for it; "
            f"torch.compiler.reset(), and compile it again: it is then compiled for the formula"
        )

    def _fake(self, *inputs: Any) -> list[Tensor]:
        tensors, _, upstream, needs, is_late, _, call = self._split(inputs)
        input = tensors[0]
        shape: Sequence[int] = ()
        if call.reduction == "none":
            shape = list(input.shape)
            if not call.is_per_element:
                del shape[call.dim]
        loss = input.new_empty(shape, dtype=call.dtype)
        if is_late and upstream is None:
            return [loss]
        layer = zip(tensors[: self.count], needs, strict=True)
        return [loss, *(t.new_empty(t.shape) for t, needed in layer if needed)]

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        tensors = inputs[: self.tensors + 1]  # And numbers.
        _, is_late, *_ = ctx.options = inputs[self.tensors + 2 :]
        ctx.save_for_backward(*tensors, *(() if is_late else output[1:]))

    def _backward(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        saved, upstream = ctx.saved_tensors, grads[0]
        inputs = (*saved[: self.tensors + 1], upstream, *ctx.options)
        tensors, numbers, _, needs, is_late, extra, call = self._split(inputs)
        if torch.is_grad_enabled():  # To be differentiated again.
            call = _with_numbers(call, numbers)
            gradients = by_formula(self.formula(*extra), call, tensors, needs, upstream)
        else:
            if is_late:
                made = self.overload(*inputs)[1:]
            else:
                layer = zip(tensors[: self.count], needs, strict=True)
                upstream = torch.ops.torchlosses.depending(upstream, [t for t, n in layer if n])
                made = [gradient * upstream for gradient in saved[self.tensors + 1 :]]
                if needs[0] and call.is_index:  # 0 times what is not finite is NaN.
                    kept: Any = Classes(tensors[self.count - 1], 1, call.ignore_index).kept
                    made[0] = made[0].where(kept.unsqueeze(call.dim), 0)
            remaining = iter(made)
            gradients = [next(remaining) if needed else None for needed in needs]
        return (*gradients, *[None] * (len(inputs) - self.count))


def _with_numbers(call: Call, numbers: Tensor | None) -> Call:
    if numbers is None:
        return call
    delta, smoothing = numbers.tolist()
    return call._replace(delta=delta, label_smoothing=smoothing)


def _bind(kernels: Kernels) -> Callable[..., Any]:
    over_input = complains = False  # No class is an error in a graph.
    return lambda *arguments: kernels.compute(*arguments, over_input, complains)


LOSS = Operator("loss", ["Tensor input", "Tensor target"], [], _bind, lambda: formulas.compute)
