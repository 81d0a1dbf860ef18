"""Dispatch to the kernels, which compute loss and gradient in one pass over the data.

The way of a call:

    public function ─ key_of ─ prepared? ─ yes ───────────── run ─ Launch.compute ─ OnePass
                                  └─ no ─ checks ─ prepare ──┘└─ formulas.compute, without kernels

- `key_of` decides whether kernels may serve a call, and by what it is looked up.
- `Launch` is what the kernels of a device prepared for such calls: `kernels/cpu`, `kernels/triton`.
- `OnePass` is the autograd node of eager calls, and `Operator` the operator in compiled graphs.
- Anything beyond a first derivative is computed by the formula.
"""

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from torchlosses import checks, formulas
from torchlosses.checks import (
    PLAIN,
    are_transforms_active,
    count_modes,
    is_before_dispatch,
    is_tracing,
)
from torchlosses.formulas import Arguments, Call, Classes, Result

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- Kernels, by device


class Launch(Protocol):
    """Computes calls whose tensors have the same layout."""

    def compute(self, *arguments: Any) -> Any:
        """The loss and its gradients, from tensors, needs and an optional upstream gradient.

        Needs say which tensors get a gradient; the last two, the weights, never do. The loss and
        gradient of a sample with an invalid class are NaN, and on the CPU an eager call raises an
        IndexError.
        """

    def rescale(
        self, gradients: Sequence[Tensor | None], grad_loss: Tensor, target: Tensor, /
    ) -> Sequence[Tensor | None] | None:
        """Multiplies gradients in place by that of their loss.

        Returns detached tensors, so the versions of saved ones do not change. In the first, ignored
        rows stay 0 though 0 · ∞ is NaN. Returns None, and does nothing, where the kernels see a
        factor that is not finite and leave it to `compute`.
        """


class Kernels(Protocol):
    """The kernels of a device: a module, or an object like one."""

    @property
    def LOSSES(self) -> Sequence[str]:  # noqa: N802
        """The names of the losses that they compute."""

    @property
    def CAN_FAIL(self) -> bool:  # noqa: N802
        """Whether a driver, compiler or device may refuse them."""

    def prepare(self, call: Call, /, *tensors: Any) -> Launch:
        """A launch for calls with the `layout_of` these tensors."""


@functools.cache
def _find_cpu() -> Any | None:
    """Imports the kernels with the first eager call: earlier, a mode could create its tensors."""
    try:
        from torchlosses.kernels import cpu
    except ImportError as error:
        checks.warn(
            "torchlosses: no compiled CPU kernels "
            f"({error}), so losses run as slower PyTorch code. Install a C++ compiler and "
            "reinstall the package."
        )
        return None
    return cpu


@functools.cache
def _find_triton(device: torch.device) -> Any | None:
    """Imports Triton with the first CUDA tensor: it takes a second, and some builds lack it."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # The tests compile for neither.
    try:
        from torchlosses.kernels import triton
    except ImportError:
        return None
    # Triton needs a C compiler for its launcher.
    return triton if try_kernels(triton, device, _try_out, triton, device) else None


def _try_out(kernels: Kernels, device: torch.device) -> Any:
    one = torch.ones((), device=device)
    call = Call("squares", False, 0, "sum", -100, torch.float32)
    return kernels.prepare(call, one, one, None, None).compute(one, one, None, None, (False, False))


# All other devices use the formulas, as do devices whose kernels have failed.
KERNELS: dict[str, Callable[[torch.device], Any]] = {
    "cpu": lambda device: _find_cpu(),
    "cuda": _find_triton,
}
_failed: set[torch.device] = set()
# Errors to raise, not to compute again by the formula; handlers of signals raise a TimeoutError.
PASS_THROUGH = (IndexError, MemoryError, torch.OutOfMemoryError, TimeoutError)


def kernels_of(device: torch.device, kind: str) -> Kernels | None:
    """The kernels of a device for a loss, if there are any and none has failed."""
    find = KERNELS.get(device.type)
    kernels = None if find is None or device in _failed else find(device)
    return kernels if kernels is not None and kind in kernels.LOSSES else None


def try_kernels(
    kernels: Kernels, device: torch.device, function: Callable[..., Any], *arguments: Any
) -> Any | None:
    """Calls a function of kernels. If it fails, disables them, warns and returns None."""
    try:
        return function(*arguments)
    except PASS_THROUGH:
        raise
    except Exception as error:
        if not kernels.CAN_FAIL:
            raise
        _prepared.clear()
        if device not in _failed:
            _failed.add(device)
            checks.warn(
                f"torchlosses: a kernel failed on {device}, so losses run there as slower PyTorch "
                f"code from now on. {type(error).__name__}: {error}"
            )
        return None


# ---- Prepared calls


class Prepared(NamedTuple):
    """A checked call, and what computes it."""

    call: Call
    kernels: Kernels
    launch: Launch
    device: torch.device
    needs: tuple[bool, ...]  # Which tensors get a gradient; weights never do.
    is_late: bool  # Gradients are computed in backward.
    formula: Callable[..., Tensor]


# A training loop repeats the same call.
_prepared: dict[tuple[Any, ...], Prepared] = {}
MAX_PREPARED = 1024


def layout_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """All properties of tensors that kernels depend on; None if they cannot read a tensor."""
    layout: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            layout.append(None)
            continue
        if type(tensor) not in PLAIN or tensor.is_neg():
            return None
        try:
            address, shape = tensor.data_ptr(), tensor.shape
        except RuntimeError:  # Sparse, nested, or a batch of gradients.
            return None
        if not address:  # Empty, or without storage.
            return None
        strides = None
        if not tensor.is_contiguous():
            strides = tensor.stride()
            if 0 in strides and len(layout) < len(tensors) - 2:
                return None  # An expanded input, whose contiguous copy would be larger.
        layout.append(
            (tensor.dtype, shape, strides, tensor.device, address & 15, tensor.requires_grad)
        )
    return tuple(layout)


def key_of(kind: str, options: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """The key of a prepared call; None if only the formula can serve.

    Kernels serve plain tensors in eager mode.
    """
    # Inlined: a call costs as much as one of these checks.
    if (
        is_compiling()
        or is_tracing()
        or is_before_dispatch()
        or are_transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or (count_modes() and checks.is_traced())
    ):
        return None
    layout = layout_of(tensors)
    return None if layout is None else (kind, options, is_grad_enabled(), layout)


def prepare(
    key: tuple[Any, ...] | None,
    call: Call,
    tensors: Sequence[Any],
    bind: Callable[[Kernels], Kernels] | None = None,
    formula: Callable[..., Tensor] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    becomes_known: bool = True,
) -> Prepared | None:
    """Prepares a checked call, or returns None if no kernels serve it.

    They compute gradients for all tensors but the weights. For the linear loss, `bind` wraps the
    kernels of a device, `formula` is its formula, and `dtypes` are those of intermediate results.
    """
    layer = tensors[:-2]
    needs = tuple(is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    if key is None or not fits(call, tensors) or True in needs[-2:]:
        return None
    device = layer[0].device
    kernels = kernels_of(device, call.kind)
    if kernels is None:
        return None
    kernels = kernels if bind is None else bind(kernels)
    launch = try_kernels(kernels, device, kernels.prepare, call, *tensors)
    if launch is None:
        return None
    is_late = needs_upstream(call, *dtypes, *[t.dtype for t in layer if t is not None])
    prepared = Prepared(
        call, kernels, launch, device, needs[:-2], is_late, formula or formula_of_tensors
    )
    if becomes_known:
        if len(_prepared) >= MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    return prepared


def find(key: tuple[Any, ...] | None) -> Prepared | None:
    """The prepared call of that key, if there is one."""
    return None if key is None else _prepared.get(key)


def formula_of_tensors(call: Call, *tensors: Any) -> Tensor:
    return formulas.compute(call, Arguments(*tensors))


def fits(call: Call, tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels support the dtypes of a call, and float32 holds its δ."""
    *layer, target, _, _ = tensors
    is_known = target is not None and (target.dtype in DTYPES or not target.is_floating_point())
    return is_known and call.is_plain_delta and all(t is None or t.dtype in DTYPES for t in layer)


def needs_upstream(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether gradients of these dtypes are computed in backward; see `OnePass`."""
    return call.reduction == "none" or torch.float16 in dtypes


def run(prepared: Prepared, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The loss by kernels, or None if they fail."""
    _, kernels, launch, device, needs, is_late, _ = prepared
    learns = True in needs
    is_hooked = learns and bool(checks.find_saving_hooks(True))
    if is_late or is_hooked:
        needs = (False,) * len(needs)
    made = try_kernels(kernels, device, launch.compute, *tensors, needs)
    loss: Tensor | None = made and made[0]
    if made and learns:
        loss = OnePass.apply(prepared, is_hooked, made, *tensors)
    return loss


def compute(
    call: Call,
    arguments: Arguments,
    key: tuple[Any, ...] | None,
    becomes_known: bool = True,
) -> Tensor:
    """The loss of a checked call."""
    if torch.compiler.is_compiling() and serves_graph(call, arguments):
        return LOSS(call, (), *arguments)
    prepared = find(key) or prepare(key, call, arguments, becomes_known=becomes_known)
    if prepared is not None:
        loss = run(prepared, arguments)
        if loss is not None:
            return loss
    input, target, *_ = arguments
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, input.shape[call.dim], call.ignore_index)
    return formulas.compute(call, arguments, classes)


class OnePass(Function):
    """The autograd node of a loss whose gradients are computed in forward and returned once.

    Some gradients are computed in backward instead: those of float16, where small values would
    underflow before a loss scaler lifts them; those of losses that are not reduced, which depend on
    the upstream gradient of each; and those under saved-tensor hooks, whose memory is not ours to
    write to. Everything that backward reads is saved, so autograd sees changes, hooks see all
    memory, and nothing is held longer.
    """

    @staticmethod
    def forward(
        ctx: Any, prepared: Prepared, is_hooked: bool, made: Result, *tensors: Tensor | None
    ) -> Tensor:
        loss, *gradients = made
        ctx.prepared, ctx.is_hooked = prepared, is_hooked
        ctx.is_made = not (prepared.is_late or is_hooked)
        ctx.save_for_backward(*tensors, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call, kernels, _, device, _, _, formula = ctx.prepared
        needs = ctx.needs_input_grad[3:-2]
        saved = ctx.saved_tensors
        tensors = saved[: len(needs) + 2]
        gradients = None
        if not (
            is_grad_enabled()  # create_graph=True.
            or is_compiling()
            or is_before_dispatch()
            or (count_modes() and checks.is_traced())
            or not _has_memory(grad_loss)
        ):
            made = saved[len(tensors) :]
            gradients = try_kernels(
                kernels, device, _gradients, ctx, tensors, needs, made, grad_loss
            )
        if gradients is None:
            gradients = formula_gradients(formula, call, tensors, needs, grad_loss)
        return None, None, None, *gradients, None, None


def _gradients(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    made: Sequence[Tensor | None],
    grad_loss: Tensor,
) -> Any:
    """The gradients by kernels."""
    call, kernels, launch, _, _, is_late, _ = ctx.prepared
    if ctx.is_hooked:  # Hooks may return other strides.
        launch = kernels.prepare(call, *tensors)
    if not is_late:
        if not ctx.is_made:
            _, *made = launch.compute(*tensors, needs)
        ctx.is_made = False  # Returned once: the caller may write to them.
        target: Any = tensors[-3]
        rescaled = launch.rescale(made, grad_loss, target)
        if rescaled is not None:
            return rescaled
    _, *made = launch.compute(*tensors, needs, grad_loss.resolve_neg())
    return made


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # In a batch of gradients.
        return False


def _show_saved(node: Any) -> Any:
    """The saved tensors of a node. A caller may set hooks on them, so backward computes anew."""
    node.is_made, node.is_hooked = False, True
    return super(_nodes, node)._raw_saved_tensors


_nodes: Any = getattr(OnePass, "_backward_cls", None)  # Private: their class.
if _nodes is None:
    checks.find_saving_hooks = bool  # There may be some.
else:
    _nodes._raw_saved_tensors = property(_show_saved)


def formula_gradients(
    formula: Callable[..., Tensor],
    call: Call,
    arguments: Sequence[Any],
    needs: Sequence[bool],
    grad_loss: Tensor,
) -> list[Tensor | None]:
    """The needed gradients, differentiable under create_graph.

    Differentiates with respect to fresh views of the arguments. If the target was computed from the
    input, that path is not followed twice.
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


def serves_graph(call: Call, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a graph that is being compiled gets the operator.

    Exported graphs use plain operations: the package may not be installed where they run.
    """
    input, *_, weight, sample_weight = tensors
    weights = [w for w in (weight, sample_weight) if w is not None]
    return (
        input is not None
        and not formulas.is_exporting()
        and not checks.is_transformed()
        and all(t is None or type(t) in checks.PLAIN for t in tensors)
        and not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        and fits(call, tensors)
        and _has_kernels(input.device, call.kind)
    )


def _has_kernels(device: torch.device, kind: str) -> bool:
    return kernels_of(device, kind) is not None


# What torch.compiler.assume_constant_result sets, which would import the compiler: Dynamo calls it
# when a graph is compiled.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]

# torch caches compiled graphs on disk by the names of their operators, with their backward. Rename
# an operator whose backward changes.
LIBRARY = torch.library.Library("torchlosses", "DEF")
CALL = (
    "str kind, bool is_index, int dim, str reduction, int ignore_index, ScalarType dtype, "
    "float delta, float label_smoothing"
)


# Identity on `upstream` that depends on `tensors`. AOTAutograd refuses a second derivative only if
# the backward graph reads the inputs; multiplying a finished gradient does not.
LIBRARY.define("depending(Tensor upstream, Tensor[] tensors) -> Tensor")
LIBRARY.impl("depending", lambda upstream, tensors: upstream.clone(), "CompositeExplicitAutograd")


HANDLE_BYTES = 16
_Bytes: Any = ctypes.c_uint8 * HANDLE_BYTES


class GradientHandle(_Bytes):  # type: ignore[misc]
    """Holds gradients between forward and backward of a compiled graph, in a tensor of 16 bytes.

    A functional operator must not return its argument, and a multiplication would be one more pass
    over memory. So backward takes the gradients from this handle, once, and rescales them in place.
    They live as long as the tensor's storage; for a copy of the tensor, backward computes again.
    """

    gradients: Sequence[Tensor | None] | None


_handles: "weakref.WeakValueDictionary[int, GradientHandle]" = weakref.WeakValueDictionary()


def hold(gradients: Sequence[Tensor | None]) -> Tensor:
    """A tensor that holds gradients."""
    handle = GradientHandle()
    handle.gradients = gradients
    _handles[ctypes.addressof(handle)] = handle
    return torch.frombuffer(handle, dtype=torch.uint8)


def take(tensor: Tensor) -> Sequence[Tensor | None] | None:
    """The gradients that a tensor holds, the first time."""
    handle = _handles.get(tensor.data_ptr())
    if handle is None:
        return None
    gradients, handle.gradients = handle.gradients, None
    return gradients


class Operator:
    """A loss and its gradients as one operator of torch, by the same kernels as eager calls.

    Its first tensors are `layer`, which get gradients, the target last; then come weights. It
    returns the loss and the needed gradients, on the CPU as a `GradientHandle`. Backward runs the
    operator again with the upstream gradient, where gradients are late or a handle holds them.
    `numbers` holds δ and ε if the graph takes them as inputs: torch.compile would specialise on
    float arguments. `bind` and `formula` are as in `prepare`, and both take `extra`.
    """

    def __init__(
        self,
        name: str,
        layer: Sequence[str],
        extra: Sequence[str],
        bind: Callable[..., Kernels],
        formula: Callable[..., Callable[..., Tensor]],
    ) -> None:
        tensors = [*layer, "Tensor? weight", "Tensor? sample_weight"]
        self.name = name
        self.count, self.tensors, self.extra = len(layer), len(tensors), len(extra)
        self.bind, self.formula = bind, formula
        options = [
            "Tensor? numbers", "Tensor? upstream", "Tensor? handle", "bool[] needs", "bool is_late"
        ]  # fmt: skip
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
        """The loss, in a graph."""
        layer = tensors[: self.count]
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in layer]
        dtypes = [t.dtype for t in layer if t is not None]
        is_late = needs_upstream(call, *extra, *dtypes)
        numbers = None
        if formulas.is_symbolic(call.delta) or formulas.is_symbolic(call.label_smoothing):
            numbers = torch.stack(
                [formulas.scalar(call.delta), formulas.scalar(call.label_smoothing)]
            )
            call = call._replace(delta=0.0, label_smoothing=0.0)
        options = (numbers, None, None, needs, is_late)
        loss: Tensor = self.overload(*tensors, *options, *extra, *call)[0]
        return loss

    def _split(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Unpacks tensors, numbers, upstream, handle, needs, is_late, extra and call."""
        options = inputs[self.tensors : self.tensors + 5]
        rest = inputs[self.tensors + 5 :]
        return inputs[: self.tensors], *options, rest[: self.extra], Call(*rest[self.extra :])

    def _run(self, *inputs: Any) -> list[Tensor]:
        tensors, numbers, upstream, handle, needs, is_late, extra, call = self._split(inputs)
        call = _with_numbers(call, numbers)
        if is_late and upstream is None:
            needs = (False,) * self.count
        gradients: Sequence[Tensor | None]
        if tensors[0].numel() == 0:  # Nothing to launch a kernel for: a sum, and no slopes.
            loss = self.formula(*extra)(call, *tensors)
            layer = zip(tensors[: self.count], needs, strict=True)
            gradients = [t.new_zeros(t.shape) if needed else None for t, needed in layer]
        else:
            loss, *gradients = self._launch(call, extra, tensors, needs, upstream, handle)
        if any(needs) and upstream is None and loss.is_cpu:
            gradients = [hold(gradients)]
        return [loss, *(gradient for gradient in gradients if gradient is not None)]

    def _launch(
        self,
        call: Call,
        extra: Sequence[Any],
        tensors: Sequence[Any],
        needs: Sequence[bool],
        upstream: Tensor | None,
        handle: Tensor | None,
    ) -> Any:
        device = tensors[0].device
        layout = layout_of(tensors)
        if layout is None:
            tensors = [None if t is None else t.resolve_neg().contiguous() for t in tensors]
            layout = layout_of(tensors)
        key = None if layout is None else (self.name, (call, *extra), layout)
        bind = functools.partial(self.bind, *extra)
        prepared = find(key) or prepare(key, call, tensors, bind)
        if prepared is not None:
            _, kernels, launch, *_ = prepared
            gradients = None if handle is None else take(handle)
            if gradients is not None:
                made = (gradients, upstream, tensors[self.count - 1])
                gradients = try_kernels(kernels, device, launch.rescale, *made)
            if gradients is not None:
                return [tensors[0].new_empty((), dtype=call.dtype), *gradients]
            options = (tuple(needs), upstream, False, False)  # No class is an error in a graph.
            results: Any = try_kernels(kernels, device, launch.compute, *tensors, *options)
            if results is not None:
                return results
        # Within an operator there is no autograd, and so no gradient by a formula.
        raise RuntimeError(
            f"a kernel of torchlosses has failed on {device}, and this graph was compiled for it; "
            f"torch.compiler.reset(), and compile it again: it is then compiled for the formula"
        )

    def _fake(self, *inputs: Any) -> list[Tensor]:
        tensors, _, upstream, _, needs, is_late, _, call = self._split(inputs)
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
        gradients = [t.new_empty(t.shape) for t, needed in layer if needed]
        if gradients and upstream is None and input.device.type == "cpu":
            gradients = [input.new_empty((HANDLE_BYTES,), dtype=torch.uint8)]
        return [loss, *gradients]

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        tensors = inputs[: self.tensors + 1]  # And numbers.
        ctx.options = inputs[self.tensors + 3 :]
        ctx.save_for_backward(*tensors, *output[1:])

    def _backward(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        saved, upstream = ctx.saved_tensors, grads[0]
        made = saved[self.tensors + 1 :]
        is_held = upstream.device.type == "cpu"
        handle = made[0] if made and is_held else None
        inputs = (*saved[: self.tensors + 1], upstream, handle, *ctx.options)
        tensors, numbers, _, _, needs, is_late, extra, call = self._split(inputs)
        if torch.is_grad_enabled():  # To be differentiated again.
            call = _with_numbers(call, numbers)
            gradients = formula_gradients(self.formula(*extra), call, tensors, needs, upstream)
        else:
            if is_late or is_held:
                made = self.overload(*inputs)[1:]
            else:
                layer = zip(tensors[: self.count], needs, strict=True)
                upstream = torch.ops.torchlosses.depending(upstream, [t for t, n in layer if n])
                made = [gradient * upstream for gradient in made]
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


LOSS = Operator(
    "loss_and_gradients",
    ["Tensor input", "Tensor target"],
    [],
    lambda kernels: kernels,
    lambda: formula_of_tensors,
)
