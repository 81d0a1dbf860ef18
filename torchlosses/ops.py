"""Dispatch to the kernels, which compute loss and gradient in one pass over the data.

An eager call:

    public function ─ key_of ─ prepared? ─ yes ────────────────────── run ─ Plan.compute ─ OnePass
                                  └─ no ─ checks ─ prepare ─ kernels ──┘
                                                       └─ none, or they fail: formulas.compute

- `key_of` returns the cache key of a call, or None if kernels cannot serve it.
- `Plan` is prepared by the kernels of a device, in `kernels/cpu` or `kernels/triton`.
- `OnePass` is the autograd node.

A compiled graph:

    public function ─ checks ─ serves_graph ─ yes ─ Operator ─ GraphNode ─ Plan.compute, or
                                           │                               operators.h on the CPU
                                           └─ no ── formulas.compute

`functional._pack_static_call` runs the checks untraced if options, shapes and dtypes are constants.

Anything beyond a first derivative is computed by the formula.
"""

import functools
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from torchlosses import checks, formulas
from torchlosses.checks import (
    PLAIN,
    are_transforms_active,
    count_modes,
    find_saving_hooks,
    is_jit_tracing,
    is_pre_dispatch_tracing,
)
from torchlosses.formulas import Arguments, Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- Kernels, by device


class Plan(Protocol):
    """Computes calls whose tensors have the same layout."""

    def compute(self, *arguments: Any) -> Any:
        """The loss and its gradients, from tensors, needs and an optional upstream gradient.

        `needs` has one bool for each tensor but the last two, the weights. After `upstream` come
        `in_place`, to write the input's gradient over the input, and `raise_on_invalid`, whether
        the CPU raises an IndexError for an invalid class (the default). Where nothing is raised,
        the loss and gradient of a sample with an invalid class are NaN.
        """

    def rescale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, target: Tensor, /
    ) -> Sequence[Tensor | None] | None:
        """Scales gradients in place by the upstream gradient.

        The gradients are contiguous, and may have other shapes than the tensors of this plan:
        `LayerPlan` passes those of the whole layer to the plan of one chunk. Changes nothing if
        `upstream` is 1. Writes through `.data`, which has a version counter of its own, so autograd
        does not see the saved tensors change; returns the `.data` tensors. Ignored rows of the
        input's gradient stay 0, though 0 · ∞ is NaN. If `upstream` is not finite, kernels may
        change nothing and return None; the caller then calls `compute` with it.
        """


class Kernels(Protocol):
    """The kernels of a device: a module, or an object like one."""

    @property
    def LOSSES(self) -> Sequence[str]:  # noqa: N802
        """The names of the losses that these kernels compute."""

    @property
    def CAN_FAIL(self) -> bool:  # noqa: N802
        """Whether a driver, compiler or device may refuse these kernels."""

    def prepare(self, call: Call, /, *tensors: Any) -> Plan:
        """A plan for calls with the `layout_of` these tensors."""


@functools.cache
def _load_cpu() -> Any | None:
    """Imports the kernels at first use, not with the package.

    The package may be imported under a fake-tensor mode, where the kernels' constants would be
    fake.
    """
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
def _load_triton(device: torch.device) -> Any | None:
    """Imports Triton with the first CUDA tensor: it takes a second, and some builds lack it."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # Neither ROCm nor a compute capability below 8.0 is tested.
    try:
        from torchlosses.kernels import triton
    except ImportError:
        return None
    # Triton needs a C compiler for its launcher.
    is_working = try_kernels(triton, device, _compute_smallest_loss, triton, device)
    return triton if is_working else None


def _compute_smallest_loss(kernels: Kernels, device: torch.device) -> Any:
    one = torch.ones((), device=device)
    call = Call("squares", False, 0, "sum", -100, torch.float32)
    return kernels.prepare(call, one, one, None, None).compute(one, one, None, None, (False, False))


# All other devices use the formulas, as do devices whose kernels have failed.
KERNEL_LOADERS: dict[str, Callable[[torch.device], Any]] = {
    "cpu": lambda device: _load_cpu(),
    "cuda": _load_triton,
}
_failed: set[torch.device] = set()
# Errors to raise again, instead of using the formula. A user's signal handler may raise a
# TimeoutError.
PASS_THROUGH = (IndexError, MemoryError, torch.OutOfMemoryError, TimeoutError)


def kernels_of(device: torch.device, kind: str) -> Kernels | None:
    """The kernels of a device for a loss, if there are any and none has failed."""
    load = KERNEL_LOADERS.get(device.type)
    kernels = None if load is None or device in _failed else load(device)
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
    plan: Plan
    device: torch.device
    needs: tuple[bool, ...]  # Whether each tensor but the last two, the weights, gets a gradient.
    is_deferred: bool  # Gradients are computed in backward.
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
        except RuntimeError:  # Sparse, nested or batched (vmap, is_grads_batched).
            return None
        if not address:  # Empty, or without storage.
            return None
        strides = None
        if not tensor.is_contiguous():
            strides = tensor.stride()
            is_weight = len(layout) >= len(tensors) - 2  # One of the last two tensors.
            if 0 in strides and not is_weight:
                return None  # Expanded: kernels would copy it, to memory larger than its own.
        layout.append(
            (tensor.dtype, shape, strides, tensor.device, address & 15, tensor.requires_grad)
        )
    return tuple(layout)


def key_of(name: str, options: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """The key of an eager call whose tensors kernels can read; None for all others.

    A compiled graph does not use it: it has an operator, which makes a key of its own.
    """
    # `checks.is_eager`, inlined: calling a Python function costs as much as a check.
    if (
        is_compiling()
        or is_jit_tracing()
        or is_pre_dispatch_tracing()
        or are_transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0  # −1 if inactive, 0 if unknown.
        or (count_modes() and checks.is_traced())
    ):
        return None
    layout = layout_of(tensors)
    return None if layout is None else (name, options, is_grad_enabled(), layout)


def prepare(
    key: tuple[Any, ...] | None,
    call: Call,
    tensors: Sequence[Any],
    wrap: Callable[..., Kernels] | None = None,
    formula: Callable[..., Tensor] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    is_cached: bool = True,
) -> Prepared | None:
    """Prepares a checked call, or returns None if no kernels serve it.

    Kernels compute gradients of all tensors but the last two, `weight` and `sample_weight`, whose
    gradients the formula computes. Eager calls of plain losses leave out `wrap`, `formula` and
    `dtypes`. `dtypes` is empty, or for the linear loss the dtype of its matrix product; `wrap` and
    `formula` take it first. See `Operator`.
    """
    differentiable = tensors[:-2]
    needs = tuple(is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    if key is None or not supports(call, tensors) or True in needs[-2:]:
        return None
    device = differentiable[0].device
    kernels = kernels_of(device, call.kind)
    if kernels is None:
        return None
    kernels = kernels if wrap is None else wrap(*dtypes, kernels)
    plan = try_kernels(kernels, device, kernels.prepare, call, *tensors)
    if plan is None:
        return None
    prepared = Prepared(
        call, kernels, plan, device, needs[:-2],
        is_deferred(call, *dtypes, *[t.dtype for t in differentiable if t is not None]),
        formula_of_tensors if formula is None else functools.partial(formula, *dtypes),
    )  # fmt: skip
    if is_cached:
        if len(_prepared) >= MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    return prepared


def find(key: tuple[Any, ...] | None) -> Prepared | None:
    """The prepared call of that key, if there is one."""
    return None if key is None else _prepared.get(key)


def formula_of_tensors(call: Call, *tensors: Any) -> Tensor:
    return formulas.compute(call, Arguments(*tensors))


def supports(call: Call, tensors: Sequence[Any]) -> bool:
    """Whether kernels support the dtypes of a call, and float32 holds its δ."""
    *inputs, target, _, _ = tensors
    if target.is_floating_point() and target.dtype not in DTYPES:
        return False
    return call.delta_fits_float32 and all(t is None or t.dtype in DTYPES for t in inputs)


def is_deferred(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether gradients of these dtypes are computed in backward; see `OnePass`."""
    return call.reduction == "none" or torch.float16 in dtypes


def run(prepared: Prepared, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The loss by kernels, or None if they fail."""
    _, kernels, plan, device, needs, deferred, _ = prepared
    needs_grad = True in needs
    # A caller may also set saved-tensor hooks later, through `loss.grad_fn._raw_saved_tensors`,
    # which is overridden below to notice that. If this torch hides the class of the node, so that
    # nothing can be overridden, assume hooks from the start.
    has_hooks = needs_grad and (_ONE_PASS_NODE is None or bool(find_saving_hooks()))
    if deferred or has_hooks:
        needs = (False,) * len(needs)
    results = try_kernels(kernels, device, plan.compute, *tensors, needs)
    if results is None:
        return None
    loss: Tensor = results[0]
    if needs_grad:
        loss = OnePass.apply((prepared, has_hooks, results), *tensors)
    return loss


def compute(
    call: Call,
    arguments: Arguments,
    key: tuple[Any, ...] | None,
    is_cached: bool = True,
) -> Tensor:
    """The loss of a checked call."""
    input, target, *_ = arguments
    if is_compiling() and serves_graph(input.device, call, arguments):
        return LOSS_OPERATOR(call, (), *arguments)
    prepared = find(key) or prepare(key, call, arguments, is_cached=is_cached)
    if prepared is not None:
        loss = run(prepared, arguments)
        if loss is not None:
            return loss
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, input.shape[call.dim], call.ignore_index)
    return formulas.compute(call, arguments, classes)


class OnePass(Function):
    """The autograd node of a loss: saves what `run` computed, and hands gradients out once.

    Some gradients are computed in backward instead: those of float16, where small values would
    underflow before a loss scaler lifts them; those of unreduced losses, each of which has its own
    upstream gradient; and those under saved-tensor hooks, because what a hook returns must not be
    written to. Everything that backward reads is saved, so version checks catch changes in place,
    hooks see every tensor, and all is freed with the graph. A second backward computes gradients
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, state: tuple[Prepared, bool, Sequence[Any]], *tensors: Tensor | None
    ) -> Tensor:
        loss: Tensor
        prepared, has_hooks, (loss, *gradients) = state
        ctx.prepared, ctx.has_hooks = prepared, has_hooks
        ctx.has_gradients = not (prepared.is_deferred or has_hooks)
        ctx.save_for_backward(*tensors, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, kernels, _, device, _, _, formula = ctx.prepared
        needs = ctx.needs_input_grad[1:-2]
        saved = ctx.saved_tensors
        tensors = saved[: len(needs) + 2]
        gradients = None
        if not (
            is_grad_enabled()  # create_graph=True.
            or is_compiling()
            or is_pre_dispatch_tracing()
            or (count_modes() and checks.is_traced())
            or not _has_memory(upstream)
        ):
            gradients = try_kernels(
                kernels, device, _gradients, ctx, tensors, needs, saved[len(tensors) :], upstream
            )
        if gradients is None:
            gradients = formula_gradients(formula, call, tensors, needs, upstream)
        return None, *gradients, None, None


def _gradients(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
    upstream: Tensor,
) -> Any:
    """The gradients times `upstream`, by the kernels.

    - Not deferred: scales those that forward saved. If it saved none (there were hooks), or an
      earlier backward has handed them out, computes them again and scales them, so that every
      backward returns the same bits.
    - Deferred, or if `rescale` returns None: computes them with `upstream`.
    """
    call, kernels, plan, _, _, deferred, _ = ctx.prepared
    if upstream.is_neg():  # Kernels read memory, which holds the opposite numbers.
        upstream = upstream.resolve_neg()
    if ctx.has_hooks:  # Hooks may return other strides.
        plan = kernels.prepare(call, *tensors)
    if not deferred:
        if not ctx.has_gradients:
            _, *gradients = plan.compute(*tensors, needs)
        ctx.has_gradients = False  # Handed out once: the caller may write to them.
        target: Any = tensors[-3]
        rescaled = plan.rescale(gradients, upstream, target)
        if rescaled is not None:
            return rescaled
    _, *gradients = plan.compute(*tensors, needs, upstream)
    return gradients


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # Batched (is_grads_batched).
        return False


_ONE_PASS_NODE: Any = getattr(OnePass, "_backward_cls", None)  # Private: the class of its nodes.


def _raw_saved_tensors(node: Any) -> Any:
    """Overrides `loss.grad_fn._raw_saved_tensors`, through which a caller may set hooks.

    Backward then computes the gradients again.
    """
    node.has_gradients, node.has_hooks = False, True
    return super(_ONE_PASS_NODE, node)._raw_saved_tensors


if _ONE_PASS_NODE is not None:
    _ONE_PASS_NODE._raw_saved_tensors = property(_raw_saved_tensors)


def formula_gradients(
    formula: Callable[..., Tensor],
    call: Call,
    arguments: Sequence[Any],
    needs: Sequence[bool],
    upstream: Tensor,
) -> list[Tensor | None]:
    """The needed gradients, differentiable under create_graph.

    Differentiates with respect to fresh views of the arguments, which do not depend on each other.
    If the target was computed from the input, the caller's graph follows that path, and following
    it here too would count it twice.
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
    gradients = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=is_differentiable))
    return [next(gradients) if needed else None for needed in needs]


# ---- In compiled graphs


def serves_graph(device: torch.device, call: Call, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a graph that is being compiled gets the operator.

    Exported graphs use plain operations: the package may not be installed where they run.
    """
    *_, weight, sample_weight = tensors
    weights = [w for w in (weight, sample_weight) if w is not None]
    return (
        not formulas.is_exporting()
        and not checks.is_transformed()
        and all(t is None or type(t) in checks.PLAIN for t in tensors)
        and not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        and supports(call, tensors)
        and _has_kernels(device, call.kind)
    )


F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Marks as torch.compiler.assume_constant_result does, which would import the compiler.

    Dynamo calls the function when it compiles a graph, and does not trace it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _has_kernels(device: torch.device, kind: str) -> bool:
    return kernels_of(device, kind) is not None


@constant
def _has_operators(device: torch.device, kind: str) -> bool:
    """Whether the kernels implement the native operators; see `LossOperator`."""
    return getattr(kernels_of(device, kind), "HAS_OPERATORS", False)


def find_constants(
    options: Sequence[Any], tensors: Sequence[Tensor | None]
) -> tuple[list[Any], list[Any]] | None:
    """The options and properties of tensors, if all are constants of the graph."""
    values: list[Any] = []
    for option in options:
        if option is None or isinstance(option, (bool, str)):
            values.append(option)
        elif isinstance(option, (int, float)) and not formulas.is_symbolic(option):
            values.append(_as_constant(option))
        else:
            return None
    properties: list[Any] = []
    for t in tensors:
        if t is None:
            properties.append(None)
            continue
        if not isinstance(t, Tensor) or t.is_nested:
            return None
        shape = []
        for size in t.shape:
            if formulas.is_symbolic(size):
                return None
            shape.append(_as_constant(size))
        properties.append((type(t), t.device, t.layout, t.dtype, shape, t.requires_grad))
    return values, properties


def _as_constant(number: Any) -> Any:
    """The number in Python's own type.

    Even for a number that it has specialised, Dynamo may hold a symbol. `__float__()` and `index`
    give the plain number; `float(number)` would return the symbol.
    """
    return number.__float__() if isinstance(number, float) else index(number)


# torch's cache on disk knows an operator by its name only, and contains the backward graph too.
# Rename an operator whose backward changes.
LIBRARY = torch.library.Library("torchlosses", "DEF")


def pack(call: Call) -> str:
    """The call as one argument of an operator: eight would take torch several microseconds."""
    kind, is_index, dim, reduction, ignore_index, dtype, delta, label_smoothing = call
    return _format(
        kind, is_index, _as_constant(dim), reduction, _as_constant(ignore_index), dtype,
        _as_constant(delta), _as_constant(label_smoothing),
    )  # fmt: skip


@constant
def _format(
    kind: str, is_index: bool, dim: int, reduction: str, ignore_index: int, dtype: torch.dtype,
    delta: float, label_smoothing: float,
) -> str:  # fmt: skip
    return (
        f"{kind} {'index' if is_index else 'dense'} {dim} {reduction} {ignore_index} "
        f"{str(dtype).removeprefix('torch.')} {delta!r} {label_smoothing!r}"
    )


def unpack(text: str) -> Call:
    kind, target, dim, reduction, ignore_index, dtype, delta, label_smoothing = text.split()
    return Call(
        kind, target == "index", int(dim), reduction, int(ignore_index), getattr(torch, dtype),
        float(delta), float(label_smoothing),
    )  # fmt: skip


HANDLE_NUMEL = 1


def hold(prepared: Prepared | None, gradients: Sequence[Tensor | None]) -> Tensor:
    """A handle: a small tensor that holds gradients between forward and backward of a graph.

    Backward scales gradients in place, which costs nothing if the upstream gradient is 1; a product
    in new memory would always cost one more pass. The backward operator returns what it has scaled.
    It must not return one of its arguments, so it gets the gradients inside a handle. They live as
    long as the handle, which autograd saves. A copy of the handle is empty, as is the handle of an
    empty input, which has no prepared call. Backward then computes the gradients again.
    """
    handle = torch.empty(HANDLE_NUMEL, dtype=torch.uint8, device="cpu")
    if prepared is not None:
        handle.held = prepared, gradients  # type: ignore[attr-defined]
    return handle


def take(handle: Tensor) -> Any:
    """Takes (prepared call, gradients) from a handle: (None, None) if it is empty."""
    return vars(handle).pop("held", (None, None))


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an operator for all devices, without derivatives: `GraphNode` computes those."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"torchlosses::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.torchlosses, name).default


class Operator:
    """A loss in compiled graphs, by the same kernels as eager calls.

    Graphs call `op`, the operator called `name`. It decomposes into `GraphNode`, an autograd node
    around two operators that run the kernels: `op_loss_and_gradients`, which returns CPU gradients
    in a handle, and `op_gradients`, which rescales those of a handle or computes them from the
    upstream gradient. On CUDA the graph itself multiplies the returned gradients.

    All take these inputs:

    - the tensors: first those that `differentiable` declares, of which the target is the last, then
      the weights;
    - `numbers`, a tensor of delta and label_smoothing if the graph takes them as inputs, else None:
      torch.compile would specialise on float arguments;
    - `dtypes` of intermediate results, one argument for each of `dtype_names`;
    - the call, as `pack` returns it.

    `op_loss_and_gradients` also takes `needs`, and `op_gradients` takes `needs`, `upstream` and
    `handles`, a list of one handle or of none.

    `wrap(*dtypes, kernels)` returns the kernels of this loss on top of those of a device.
    `formula(*dtypes, call, *tensors)` returns the loss.
    """

    def __init__(
        self,
        name: str,
        differentiable: Sequence[str],
        dtype_names: Sequence[str],
        wrap: Callable[..., Kernels],
        formula: Callable[..., Tensor],
    ) -> None:
        self.name, self.wrap, self.formula = name, wrap, formula
        self.num_differentiable, self.num_tensors = len(differentiable), len(differentiable) + 2
        self.call_position = self.num_tensors + 1 + len(dtype_names)
        inputs = ", ".join([
            *differentiable, "Tensor? weight", "Tensor? sample_weight", "Tensor? numbers",
            *[f"ScalarType {dtype}" for dtype in dtype_names], "str call",
        ])  # fmt: skip
        LIBRARY.define(f"{name}({inputs}) -> Tensor")
        LIBRARY.impl(name, self._decompose, "CompositeImplicitAutograd")
        self.op = getattr(torch.ops.torchlosses, name).default
        self.op_loss_and_gradients = _define(
            f"{name}_and_gradients({inputs}, bool[] needs) -> Tensor[]",
            self._compute_loss_and_gradients, _fake_loss_and_gradients,
        )  # fmt: skip
        self.op_gradients = _define(
            f"{name}_gradients({inputs}, bool[] needs, Tensor upstream, Tensor[] handles)"
            " -> Tensor[]",
            self._compute_gradients, _fake_gradients,
        )  # fmt: skip

    def __call__(self, call: Call, dtypes: Sequence[torch.dtype], *tensors: Any) -> Tensor:
        """The loss, in a graph."""
        numbers = None
        if formulas.is_symbolic(call.delta) or formulas.is_symbolic(call.label_smoothing):
            numbers = torch.stack(
                [formulas.scalar(call.delta), formulas.scalar(call.label_smoothing)]
            )
            call = call._replace(delta=0.0, label_smoothing=0.0)
        return cast("Tensor", self.op(*tensors, numbers, *dtypes, pack(call)))

    def dtypes_and_call(self, inputs: Sequence[Any]) -> tuple[Sequence[torch.dtype], Call]:
        end = self.call_position
        return inputs[self.num_tensors + 1 : end], unpack(inputs[end])

    def call_loss_and_gradients(self, *inputs: Any) -> list[Tensor]:
        """Calls the operator, for a tracer to record."""
        return cast("list[Tensor]", self.op_loss_and_gradients(*inputs))

    def call_gradients(self, *inputs: Any) -> list[Tensor]:
        """Calls the operator, for a tracer to record."""
        return cast("list[Tensor]", self.op_gradients(*inputs))

    def _decompose(self, *inputs: Any) -> Tensor:
        is_enabled = torch.is_grad_enabled()
        tensors = inputs[: self.num_differentiable]
        needs = [is_enabled and t is not None and t.requires_grad for t in tensors]
        if True in needs:
            return cast("Tensor", GraphNode.apply(self, needs, *inputs))
        return self.call_loss_and_gradients(*inputs, needs)[0]

    def _compute_loss_and_gradients(self, *inputs: Any) -> list[Tensor]:
        """Runs the kernels when the graph runs."""
        needs = inputs[-1]
        prepared, loss, *gradients = self._run_kernels(inputs, needs)
        if True in needs and loss.is_cpu:
            return [loss, hold(prepared, gradients)]
        return [loss, *[gradient for gradient in gradients if gradient is not None]]

    def _compute_gradients(self, *inputs: Any) -> list[Tensor]:
        """Runs the kernels when the graph runs."""
        needs, upstream, handles = inputs[-3:]
        prepared, gradients = take(handles[0]) if handles else (None, None)
        if prepared is not None:
            target = inputs[self.num_differentiable - 1]
            gradients = try_kernels(
                prepared.kernels, prepared.device, prepared.plan.rescale,
                gradients, upstream, target,
            )  # fmt: skip
        if gradients is None:
            _, _, *gradients = self._run_kernels(inputs, needs, upstream)
        return [gradient for gradient in gradients if gradient is not None]

    def _run_kernels(
        self, inputs: Sequence[Any], needs: Sequence[bool], upstream: Tensor | None = None
    ) -> Any:
        """The prepared call (None for an empty input), the loss and the gradients."""
        tensors, numbers = inputs[: self.num_tensors], _to_floats(inputs[self.num_tensors])
        *dtypes, text = inputs[self.num_tensors + 1 : self.call_position + 1]
        if tensors[0].numel() == 0:  # The formula's empty sum, and zero gradients.
            pairs = zip(tensors, needs, strict=False)
            zeros = [t.new_zeros(t.shape) if needed else None for t, needed in pairs]
            call = _with_numbers(unpack(text), numbers)
            return None, self.formula(*dtypes, call, *tensors), *zeros
        device = tensors[0].device
        layout = layout_of(tensors)
        if layout is None:  # Such as expanded tensors, for which eager calls use the formula.
            tensors = tuple(None if t is None else t.contiguous() for t in tensors)
            layout = layout_of(tensors)
        key = None if layout is None else (self.name, text, numbers, *dtypes, layout)
        prepared = find(key)
        if prepared is None:
            call = _with_numbers(unpack(text), numbers)
            prepared = prepare(key, call, tensors, self.wrap, self.formula, dtypes)
        results = None
        if prepared is not None:
            in_place = raise_on_invalid = False  # A graph raises no IndexError.
            rest = (tuple(needs), upstream, in_place, raise_on_invalid)
            results = try_kernels(prepared.kernels, device, prepared.plan.compute, *tensors, *rest)
        # The formula cannot take over: autograd, which differentiates it, is off in an operator.
        if results is None:
            raise RuntimeError(
                f"torchlosses has no kernels on {device}, or one has failed, and this graph was "
                "compiled for them; call torch.compiler.reset() and compile it again: the graph "
                "will then use slower PyTorch code"
            )
        return prepared, *results


def _fake_loss_and_gradients(*inputs: Any) -> list[Tensor]:
    input, *_, text, needs = inputs
    call = unpack(text)
    shape: Sequence[int] = ()
    if call.reduction == "none":
        shape = list(input.shape)
        if not call.is_per_element:
            del shape[call.dim]
    loss = input.new_empty(shape, dtype=call.dtype)
    if True in needs and input.device.type == "cpu":
        return [loss, input.new_empty((HANDLE_NUMEL,), dtype=torch.uint8)]
    return [loss, *_fake_like(inputs, needs)]


def _fake_gradients(*inputs: Any) -> list[Tensor]:
    return _fake_like(inputs, inputs[-3])


def _fake_like(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs, strict=False) if needed]


# Returns `upstream`, and makes the backward graph read `tensors`. On CUDA that graph multiplies
# saved gradients by `upstream`, and would read no input of forward. AOTAutograd would then allow a
# second derivative, and get it wrong; with this dependency it raises an error.
LIBRARY.define("depending(Tensor upstream, Tensor[] tensors) -> Tensor")
LIBRARY.impl("depending", lambda upstream, _: upstream.clone(), "CompositeExplicitAutograd")


class GraphNode(Function):
    """The autograd node of a loss in a compiled graph."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, needs: list[bool], *inputs: Any) -> Tensor:
        dtypes, call = operator.dtypes_and_call(inputs)
        tensor_dtypes = [t.dtype for t in inputs[: operator.num_differentiable] if t is not None]
        ctx.operator, ctx.needs = operator, needs
        ctx.dtypes_and_text = inputs[operator.num_tensors + 1 :]
        if is_deferred(call, *dtypes, *tensor_dtypes):
            needs = [False] * len(needs)
        loss: Tensor
        loss, *gradients = operator.call_loss_and_gradients(*inputs, needs)
        ctx.save_for_backward(*inputs[: operator.num_tensors + 1], *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        operator, needs = ctx.operator, ctx.needs
        num_tensors = operator.num_tensors
        *tensors, numbers = ctx.saved_tensors[: num_tensors + 1]
        # Empty if gradients are deferred. If not: on the CPU one handle that holds the gradients,
        # on CUDA the gradients themselves.
        saved = ctx.saved_tensors[num_tensors + 1 :]
        inputs = (*tensors, numbers, *ctx.dtypes_and_text)
        dtypes, call = operator.dtypes_and_call(inputs)
        nones = [None] * (len(inputs) - len(needs))  # For weights, numbers, dtypes and the call.
        if torch.is_grad_enabled():  # To be differentiated again.
            call = _with_numbers(call, _to_floats(numbers))
            formula = functools.partial(operator.formula, *dtypes)
            return None, None, *formula_gradients(formula, call, tensors, needs, upstream), *nones
        if not saved or upstream.device.type == "cpu":
            gradients = operator.call_gradients(*inputs, needs, upstream, saved)
        else:
            read = [t for t, needed in zip(tensors, needs, strict=False) if needed]
            upstream = torch.ops.torchlosses.depending(upstream, read)
            gradients = [gradient * upstream for gradient in saved]
            if needs[0] and call.is_index:  # 0 times what is not finite is NaN.
                target = tensors[operator.num_differentiable - 1]
                not_ignored = formulas.is_not_ignored(target, call.ignore_index)
                gradients[0] = gradients[0].where(not_ignored.unsqueeze(call.dim), 0)
        remaining = iter(gradients)
        return None, None, *[next(remaining) if n else None for n in needs], *nones


def _to_floats(numbers: Tensor | None) -> tuple[float, ...] | None:
    return None if numbers is None else tuple(numbers.tolist())


def _with_numbers(call: Call, numbers: tuple[float, ...] | None) -> Call:
    if numbers is None:
        return call
    delta, smoothing = numbers
    return call._replace(delta=delta, label_smoothing=smoothing)


class LossOperator(Operator):
    """The operator of a plain loss.

    Kernels with `HAS_OPERATORS` implement three native operators in C++, which torch calls faster.
    They serve calls without weights and numbers, whose target needs no gradient.
    """

    def __init__(self) -> None:
        super().__init__(
            "loss",
            ["Tensor input", "Tensor target"],
            [],
            lambda kernels: kernels,
            formula_of_tensors,
        )
        inputs = "Tensor input, Tensor target, str call"
        # The native operators in Python, for a graph from torch's cache on disk, which may run
        # before this process has loaded the kernels.
        python = NativeSignatures(self._compute_loss_and_gradients, self._compute_gradients)
        fake = NativeSignatures(_fake_loss_and_gradients, _fake_gradients)
        self.native_loss = _define(f"native_loss({inputs}) -> Tensor", python.loss, fake.loss)
        self.native_loss_and_gradient = _define(
            f"native_loss_and_gradient({inputs}) -> (Tensor, Tensor)",
            python.loss_and_gradient, fake.loss_and_gradient,
        )  # fmt: skip
        self.native_gradient = _define(
            f"native_loss_gradient({inputs}, Tensor upstream, Tensor handle) -> Tensor",
            python.gradient, fake.gradient,
        )  # fmt: skip

    def call_loss_and_gradients(self, *inputs: Any) -> list[Tensor]:
        native_inputs = _find_native_inputs(inputs[:-1], inputs[-1])
        if native_inputs is None:
            return super().call_loss_and_gradients(*inputs)
        if True in inputs[-1]:
            return list(self.native_loss_and_gradient(*native_inputs))
        return [self.native_loss(*native_inputs)]

    def call_gradients(self, *inputs: Any) -> list[Tensor]:
        *loss_inputs, needs, upstream, handles = inputs
        native_inputs = _find_native_inputs(loss_inputs, needs)
        if native_inputs is None:
            return super().call_gradients(*inputs)
        # The schema requires a tensor. One that is no handle counts as an empty handle.
        handle = handles[0] if handles else upstream
        return [self.native_gradient(*native_inputs, upstream, handle)]


class NativeSignatures(NamedTuple):
    """Adapts two functions of `Operator`s to the signatures of the three native operators.

    Those have no weights and no numbers, and only the input gets a gradient.
    """

    compute_loss_and_gradients: Callable[..., Sequence[Tensor]]
    compute_gradients: Callable[..., Sequence[Tensor]]

    def loss(self, input: Tensor, target: Tensor, text: str) -> Tensor:
        return self.compute_loss_and_gradients(
            input, target, None, None, None, text, [False, False]
        )[0]

    def loss_and_gradient(self, input: Tensor, target: Tensor, text: str) -> tuple[Tensor, ...]:
        return tuple(
            self.compute_loss_and_gradients(input, target, None, None, None, text, [True, False])
        )

    def gradient(
        self, input: Tensor, target: Tensor, text: str, upstream: Tensor, handle: Tensor
    ) -> Tensor:
        inputs = (input, target, None, None, None, text)
        return self.compute_gradients(*inputs, [True, False], upstream, [handle])[0]


def _find_native_inputs(inputs: Sequence[Any], needs: Sequence[bool]) -> Sequence[Any] | None:
    """The inputs of the native operators, or None if they do not serve the call."""
    input, target, weight, sample_weight, numbers, text = inputs
    is_plain = weight is None and sample_weight is None and numbers is None and not needs[1]
    kind = text.partition(" ")[0]
    return (input, target, text) if is_plain and _has_operators(input.device, kind) else None


LOSS_OPERATOR = LossOperator()
