"""The losses as functions: check the call, then compute it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from torchlosses import checks, linear, ops, sharded
from torchlosses.checks import PLAIN, Options, Reduction
from torchlosses.formulas import LOSSES, Arguments, Call

__all__ = ["cross_entropy_error", "linear_cross_entropy_error", "sum_squared_error"]


def sum_squared_error(
    input: Tensor,
    target: Tensor,
    *,
    reduction: Reduction = "sum",
    dim: int | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Sum of squared errors, E = ½ Σₖ (yₖ − tₖ)².

    The function behind :class:`torchlosses.SumSquaredError`, where every argument, dtype, error
    and source is described.

    >>> import torch
    >>> from torchlosses.functional import sum_squared_error
    >>> y = torch.tensor([0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0])
    >>> sum_squared_error(y, torch.tensor(2))
    tensor(0.0975)
    """
    options = (reduction, dim, ignore_index)
    return _compute("squares", options, input, target, None, sample_weight)


def cross_entropy_error(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
    delta: float = 1e-7,
    from_logits: bool = False,
    dim: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy guarded by a δ, E = − Σₖ tₖ · log(yₖ + δ), in nats.

    The function behind :class:`torchlosses.CrossEntropyError`, where every argument, dtype, error
    and source is described.

    >>> import torch
    >>> from torchlosses.functional import cross_entropy_error
    >>> y = torch.tensor([0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0])
    >>> cross_entropy_error(y, torch.tensor(2))
    tensor(0.5108)
    """
    options = (reduction, dim, ignore_index, delta, label_smoothing, from_logits)
    kind = "logits" if from_logits else "probabilities"
    return _compute(kind, options, input, target, weight, sample_weight)


def linear_cross_entropy_error(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
    delta: float = 1e-7,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer without holding all logits in memory.

    The function behind :class:`torchlosses.LinearCrossEntropyError`, where every argument, dtype,
    error and source is described. Use it when `linear_weight` is tied to another module's, such
    as an embedding's.

    >>> import torch
    >>> from torchlosses.functional import linear_cross_entropy_error
    >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2)
    >>> linear_cross_entropy_error(x, w, torch.tensor([1, 0]))
    tensor(1.6265)
    """
    options = checks.cached_options(reduction, None, ignore_index, delta, label_smoothing)
    logits_shape = checks.check_linear(input, linear_weight, linear_bias)
    dim = len(logits_shape) - 1
    is_index = checks.check_target(input, logits_shape, target, dim, options.ignore_index, "logits")
    if _is_one(logits_shape[dim]):
        checks.warn_of_one_class(dim, is_linear=True)
    checks.check_weights(
        input, logits_shape, weight, dim, sample_weight, logits_shape[:-1], "logits"
    )
    call = _make_call("logits", options, is_index, dim, input, target)
    arguments = (input, linear_weight, linear_bias, target, weight, sample_weight)
    arguments = sharded.wait_all(arguments)
    if sharded.is_sharded(*arguments):
        return sharded.compute_linear(call, *arguments)
    if not is_compiling() and torch.is_anomaly_enabled():
        checks.check_target_values(call, target, sample_weight)
    return linear.compute(call, *arguments)


# torch.fx.symbolic_trace records them as calls, like torch's own losses.
torch.fx.wrap("sum_squared_error")
torch.fx.wrap("cross_entropy_error")
torch.fx.wrap("linear_cross_entropy_error")


def _is_one(size: int) -> bool:
    return type(size) is int and size == 1  # A symbolic size counts as more.


def _make_call(
    kind: str, options: Options, is_index: bool, dim: int, input: Tensor, target: Tensor
) -> Call:
    is_double = input.dtype == torch.float64 or target.dtype == torch.float64
    return Call(
        kind, is_index, dim, options.reduction, options.ignore_index,
        torch.float64 if is_double else torch.float32, options.delta, options.label_smoothing,
    )  # fmt: skip


def _compute(
    kind: str,
    options: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """Checks a call and computes its loss. `options` are the arguments of `check_options`."""
    tensors = (input, target, weight, sample_weight)
    if is_compiling():
        constants = ops.find_constants(options, tensors)
        static = None if constants is None else _pack_static_call(kind, *constants)
        if static is not None:
            symbolic_numbers = None  # `static` contains delta and label_smoothing.
            loss: Tensor = ops.LOSS_OPERATOR.op(*tensors, symbolic_numbers, static)
            return loss
    checked = checks.cached_options(*options)
    prepared = ops.find(ops.key_of(kind, checked, tensors))
    # Anomaly mode checks values first, so it takes no shortcut.
    if prepared is not None and not torch.is_anomaly_enabled():
        result = ops.run(prepared, tensors)
        if result is not None:
            return result
    call, arguments, has_one_class = _check(kind, checked, *tensors)
    if has_one_class:
        checks.warn_of_one_class(call.dim, is_linear=False)
    arguments = Arguments(*sharded.wait_all(arguments))
    if sharded.is_sharded(*arguments):
        return sharded.compute(call, arguments)
    if not is_compiling() and torch.is_anomaly_enabled():
        classes = None
        if call.is_index:
            num_classes = arguments.input.shape[call.dim]
            classes = checks.check_classes(arguments.target, num_classes, call.ignore_index)
        checks.check_values(call, arguments, classes)
    key = ops.key_of(kind, checked, arguments)  # Again, as the tensors may be others now.
    # A call that warns is not cached. If it were, later calls, also from other lines of the user's
    # code, would return above and never warn.
    return ops.compute(call, arguments, key, is_cached=not has_one_class)


def _check(
    kind: str,
    options: Options,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Call, Arguments, bool]:
    """The call, its tensors, and whether it is a softmax over one class."""
    dim = checks.check_dim(input, options.dim)
    is_per_element = LOSSES[kind].is_per_element
    if not is_per_element and input.dim() == 0 and target.shape == input.shape:
        input, target = input.unsqueeze(0), target.unsqueeze(0)  # One class, and no dimension.
    is_index = checks.check_target(input, input.shape, target, dim, options.ignore_index)
    has_softmax = LOSSES[kind].domain == "logit" and not is_per_element
    has_one_class = has_softmax and _is_one(input.shape[dim])
    if weight is not None or sample_weight is not None:
        # Sample weights broadcast to the target's shape if it holds class indices (one weight per
        # sample), or if each element has a loss (one weight per element).
        if is_index or is_per_element:
            sample_weight_shape = target.shape
        else:
            sample_weight_shape = checks.samples_shape(input, dim)
        checks.check_weights(input, input.shape, weight, dim, sample_weight, sample_weight_shape)
    call = _make_call(kind, options, is_index, dim, input, target)
    return call, Arguments(input, target, weight, sample_weight), has_one_class


class _Properties(NamedTuple):
    """The properties of a tensor that `ops.find_constants` collects."""

    type: type
    device: torch.device
    layout: torch.layout
    dtype: torch.dtype
    shape: list[int]
    requires_grad: bool

    @property
    def is_plain(self) -> bool:
        return self.type in PLAIN and self.layout is torch.strided

    def make_meta(self) -> Tensor:
        return torch.empty(
            self.shape, dtype=self.dtype, device="meta", requires_grad=self.requires_grad
        )


@ops.constant
def _pack_static_call(kind: str, options: Sequence[Any], properties: Sequence[Any]) -> str | None:
    """The call as the operator's string argument, or None if the graph must trace the checks.

    Dynamo runs this once per graph. Traced code would cost a guard, at each call, for everything it
    reads.
    """
    given: list[Any] = [p and _Properties(*p) for p in properties]
    if len({p.device for p in given if p}) > 1 or not all(p.is_plain for p in given if p):
        return None
    try:
        checked = checks.check_options(*options)
        call, arguments, has_one_class = _check(
            kind, checked, *[p and p.make_meta() for p in given]
        )
    except (TypeError, ValueError):
        return None  # The traced code raises it, with the user's tensors.
    # Left to the traced checks, which warn of one class, and which pass a 0-D input on with the
    # dimension that `_check` adds; from here the operator would get the user's tensors.
    if has_one_class or arguments.input.dim() != len(given[0].shape):
        return None
    return ops.pack(call) if ops.serves_graph(given[0].device, call, arguments) else None
