"""The losses as functions: check the call, then compute it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from torchlosses import checks, linear, ops, sharded
from torchlosses.checks import Options, Reduction
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
    error and source is described. Use it where the layer's weight is another's too, such as an
    embedding's.

    >>> import torch
    >>> from torchlosses.functional import linear_cross_entropy_error
    >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2)
    >>> linear_cross_entropy_error(x, w, torch.tensor([1, 0]))
    tensor(1.6265)
    """
    options = checks.cached_options(reduction, None, ignore_index, delta, label_smoothing)
    shape = checks.check_linear(input, linear_weight, linear_bias)
    dim = len(shape) - 1
    is_index = checks.check_target(input, shape, target, dim, options.ignore_index, "logits")
    if _is_one(shape[dim]):
        checks.warn_of_one_class(dim, is_linear=True)
    checks.check_weights(input, shape, weight, dim, sample_weight, shape[:-1], "logits")
    call = _call("logits", options, is_index, dim, input, target)
    arguments = (input, linear_weight, linear_bias, target, weight, sample_weight)
    arguments = sharded.waited(arguments)
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
    """Whether a size is known to be 1: those of a graph may be symbols."""
    return type(size) is int and size == 1


def _call(
    kind: str, options: Options, is_index: bool, dim: int, input: Tensor, target: Tensor
) -> Call:
    reduction, _, ignore_index, delta, label_smoothing = options
    is_double = input.dtype == torch.float64 or target.dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    return Call(kind, is_index, dim, reduction, ignore_index, dtype, delta, label_smoothing)


def _compute(
    kind: str,
    options: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    tensors = (input, target, weight, sample_weight)
    if is_compiling():
        constants = ops.find_constants(options, tensors)
        static = None if constants is None else _find_call(kind, *constants)
        if static is not None:
            loss: Tensor = ops.LOSS.loss(*tensors, None, *static)
            return loss
    checked = checks.cached_options(*options)
    prepared = ops.find(ops.key_of(kind, checked, tensors))
    if prepared is not None and not torch.is_anomaly_enabled():  # Then values are checked too.
        result = ops.run(prepared, tensors)
        if result is not None:
            return result
    call, arguments, has_one_class = _check(kind, checked, *tensors)
    if has_one_class:
        checks.warn_of_one_class(call.dim, is_linear=False)
    arguments = Arguments(*sharded.waited(arguments))
    if sharded.is_sharded(*arguments):
        return sharded.compute(call, arguments)
    if not is_compiling() and torch.is_anomaly_enabled():
        classes = None
        if call.is_index:
            num_classes = arguments.input.shape[call.dim]
            classes = checks.check_classes(arguments.target, num_classes, call.ignore_index)
        checks.check_values(call, arguments, classes)
    # A call that warns is never prepared, so it warns at each line of the user.
    return ops.compute(call, arguments, ops.key_of(kind, checked, arguments), not has_one_class)


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
        is_like_target = is_index or is_per_element
        samples = target.shape if is_like_target else checks.samples_shape(input, dim)
        checks.check_weights(input, input.shape, weight, dim, sample_weight, samples)
    call = _call(kind, options, is_index, dim, input, target)
    return call, Arguments(input, target, weight, sample_weight), has_one_class


def _find_call(
    kind: str, options: Sequence[Any], properties: Sequence[tuple[Any, ...] | None]
) -> tuple[Any, ...] | None:
    """The checked call of a graph, or None if the operator does not serve it.

    Dynamo runs this once per graph. Traced code would cost a guard, at each call, for everything it
    reads.
    """
    types, layouts, devices = ({p[k] for p in properties if p is not None} for k in range(3))
    if not types <= {*checks.PLAIN} or layouts != {torch.strided} or len(devices) > 1:
        return None
    tensors: list[Any] = [None if p is None else _make_meta(*p[3:]) for p in properties]
    try:
        call, arguments, has_one_class = _check(kind, checks.check_options(*options), *tensors)
    except (TypeError, ValueError):
        return None  # The traced code raises it, with the user's tensors.
    size = arguments.input.numel()
    is_served = ops.serves_graph(devices.pop(), call, arguments, size)
    return tuple(call) if is_served and not has_one_class else None


def _make_meta(dtype: torch.dtype, shape: Sequence[int], requires_grad: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


# Set by torch.compiler.assume_constant_result, which would import the compiler.
_find_call._dynamo_marked_constant = True  # type: ignore[attr-defined]
