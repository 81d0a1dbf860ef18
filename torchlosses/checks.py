"""Checks of options, shapes, dtypes, devices and values.

A message names the argument, what it got, and what it should be.
"""

import functools
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchlosses.formulas import Arguments, Call, Classes, to_int64

PLAIN = (Tensor, nn.Parameter)
IGNORE_INDEX = -100  # The default.
OWN_FRAMES = ("torchlosses", "torch")
Reduction = Literal["sum", "mean", "batchmean", "none"]
REDUCTIONS = get_args(Reduction)


def assume_yes(*_: Any) -> int:
    """Replaces a detector that this torch lacks. It answers yes, so calls take the safe way."""
    return 1


# Private: torch.jit.is_tracing wraps it in Python, where the handler of a signal may raise.
is_jit_tracing: Callable[[], int] = getattr(torch._C, "_is_tracing", assume_yes)
# Private, without a public twin: the number of active dispatch modes (tracers, fake tensors, users'
# own), and the modes under which tensors have no values.
count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", assume_yes)
_INFRA_MODES = [
    getattr(getattr(torch._C, "_TorchDispatchModeKey", None), key, None)
    for key in ("FAKE", "PROXY", "FUNCTIONAL")
]
# Private: whether a transform of torch.func is active.
are_transforms_active: Callable[[], int] = getattr(
    torch._C, "_are_functorch_transforms_active", assume_yes
)
try:  # Private: whether a tracer records operations ahead of autograd.
    is_pre_dispatch_tracing: Callable[[], int] = functools.partial(
        torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
    )
except AttributeError:
    is_pre_dispatch_tracing = assume_yes
try:  # Private: the innermost saved-tensor hooks, if any. True: also under a tracer.
    find_saving_hooks: Callable[[], Any] = functools.partial(
        torch._C._autograd._top_saved_tensors_default_hooks, True
    )
except AttributeError:
    find_saving_hooks = assume_yes


def is_traced() -> bool:
    """True under tracing, compiling or fake tensors, where values cannot be read."""
    if torch.compiler.is_compiling() or is_jit_tracing() or is_pre_dispatch_tracing():
        return True
    if not count_modes():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _INFRA_MODES)


def is_transformed() -> bool:
    """True under a transform of torch.func or forward-mode differentiation."""
    # Private; the public alternative unpacks every tensor.
    return bool(are_transforms_active()) or getattr(forward_ad, "_current_level", 0) >= 0


def is_eager() -> bool:
    """True in plain eager mode."""
    return not (is_traced() or is_transformed())


class Options(NamedTuple):
    """Checked options of a loss, with numbers of Python's own types."""

    reduction: str
    dim: int | None
    ignore_index: int
    delta: float
    label_smoothing: float
    from_logits: bool


def check_options(
    reduction: str,
    dim: int | None,
    ignore_index: int,
    delta: float = 0.0,
    label_smoothing: float = 0.0,
    from_logits: bool = False,
) -> Options:
    if reduction not in REDUCTIONS:
        expected = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction: got {reduction!r}; expected one of {expected}")
    if dim is not None and type(dim) is not int:
        dim = _integer("dim", dim, "an int or None")
    if type(ignore_index) is not int:
        ignore_index = _integer("ignore_index", ignore_index, "an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}; expected an int of 64 bits")
    if type(delta) is not float:
        delta = _number("delta", delta)
    if not 0 <= delta < math.inf:
        raise ValueError(f"delta: got {delta!r}; expected a finite number of at least 0")
    if type(label_smoothing) is not float:
        label_smoothing = _number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}; expected a number in [0, 1]")
    if from_logits is not False and from_logits is not True:
        raise TypeError(f"from_logits: got {from_logits!r}; expected a bool")
    return Options(reduction, dim, ignore_index, delta, label_smoothing, from_logits)


# Typed: 1, 1.0 and True are equal.
_cached_check = functools.lru_cache(maxsize=1024, typed=True)(check_options)


def cached_options(*options: Any) -> Options:
    """`check_options`, once for each set of options."""
    if not torch.compiler.is_compiling():
        try:
            return _cached_check(*options)
        except TypeError:  # Unhashable, or of a wrong type.
            pass
    return check_options(*options)


def _integer(name: str, value: Any, expected: str) -> int:
    """Converts any integer, NumPy's included; a bool is an error."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name}: got {value!r}; expected {expected}")
    return operator.index(value)


def _number(name: str, value: Any) -> float:
    """Converts any real number, NumPy's included; a bool is an error."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_dim(input: Tensor, dim: int | None) -> int:
    """The class dimension, counted from the front."""
    _check_real("input", input, None)
    if not input.is_floating_point():
        raise TypeError(
            f"input: got dtype {input.dtype}; expected a floating dtype (input and target swapped?)"
        )
    if dim is None:
        return 1 if input.dim() > 1 else 0
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim: got {dim} for an input of shape {tuple(input.shape)}; "
            f"expected {-rank} to {rank - 1}"
        )
    return operator.index(dim) % rank  # A constant in a graph.


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.Size:
    """The shape of a linear layer's logits."""
    check_dim(input, None)
    if input.dim() == 0:
        raise ValueError("input: got shape (); expected (..., D), the features last")
    tensors = {"linear_weight": linear_weight}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    for name, tensor in tensors.items():
        _check_real(name, tensor, input)
        if tensor.dtype != input.dtype and not _is_cast(input.device.type, tensor, input):
            raise TypeError(
                f"{name}: got dtype {tensor.dtype}; expected {input.dtype}, the input's dtype"
            )
    if linear_weight.dim() != 2 or linear_weight.shape[1:] != input.shape[-1:]:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)} for an input of shape "
            f"{tuple(input.shape)}; expected (V, {input.shape[-1]}), a row for each of V classes"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"linear_bias: got shape {tuple(linear_bias.shape)} for a linear_weight of shape "
            f"{tuple(linear_weight.shape)}; expected {tuple(linear_weight.shape[:1])}"
        )
    return input.shape[:-1] + linear_weight.shape[:1]


def _is_cast(device: str, *tensors: Tensor) -> bool:
    """Whether autocast casts the tensors to one dtype."""
    if not torch.is_autocast_enabled(device):
        return False
    return all(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)


def check_target(
    input: Tensor,
    shape: torch.Size,
    target: Tensor,
    dim: int,
    ignore_index: int,
    name: str = "an input",
) -> bool:
    """Checks `target`, and returns whether it holds class indices.

    `shape` is that of the input, or of the logits that `name` calls by another name.
    """
    _check_real("target", target, input)
    if target.shape == shape:
        if ignore_index != IGNORE_INDEX:
            raise ValueError(
                f"ignore_index: got {ignore_index} beside a dense target of shape {tuple(shape)}, "
                f"which has no class index to ignore; expected class indices as the target, or a "
                f"sample_weight of 0 for each sample to ignore"
            )
        return False
    samples = shape[:dim] + shape[dim + 1 :]
    if target.shape != samples:
        hint = ""
        if name == "an input":  # Only these losses take `dim`.
            fits = [d for d in range(input.dim()) if samples_shape(input, d) == target.shape]
            hint = f"; classes in dimension {fits[0]} need dim={fits[0]}" if fits else ""
            if any(n > 1 and samples_shape(target, d) == shape for d, n in enumerate(target.shape)):
                hint = " (input and target swapped?)"
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for {name} of shape {tuple(shape)} "
            f"with classes in dimension {dim}; expected the same shape, or {tuple(samples)} of an "
            f"integer dtype for class indices{hint}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(
            f"target: got dtype {target.dtype} and shape {tuple(target.shape)} for {name} of shape "
            f"{tuple(shape)}, where only class indices fit; expected an integer dtype, or the same "
            f"shape (a forgotten unsqueeze?)"
        )
    return True


def warn_of_one_class(dim: int, *, is_linear: bool) -> None:
    """Warns that a softmax over one class learns nothing."""
    if is_linear:
        got, remedy = "linear_weight: got one class", "use torch.nn.Linear and "
    else:
        got = f"input: got logits of one class, in dimension {dim}"
        remedy = f"pass torch.cat([torch.zeros_like(z), z], {dim}) with class indices, or "
    warn(
        f"{got}; the softmax of one logit is 1, so the loss stays 0 and so does its gradient. "
        f"Expected at least 2 classes: for two classes by one logit z, {remedy}"
        f"torch.nn.BCEWithLogitsLoss"
    )


# Graphs cannot warn, so this runs when a graph is compiled. It is what
# torch.compiler.assume_constant_result sets, which would import the compiler.
warn_of_one_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


def warn(message: str) -> None:
    """Warns at the user's line: the nearest one outside of this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in OWN_FRAMES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def samples_shape(input: Tensor, dim: int) -> torch.Size:
    """The shape of `input` without its class dimension."""
    return input.shape[:dim] + input.shape[dim + 1 :]


def check_weight(weight: Tensor | None, num_classes: int | None = None) -> None:
    """Checks class weights before there is an input."""
    if weight is not None:
        _check_real("weight", weight, None)
        if weight.dim() != 1 or num_classes not in (None, len(weight)):
            expected = "C" if num_classes is None else num_classes
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}; expected ({expected},), one weight per "
                f"class"
            )


def check_weights(
    input: Tensor,
    shape: torch.Size,
    weight: Tensor | None,
    dim: int,
    sample_weight: Tensor | None,
    samples: tuple[int, ...],
    name: str = "an input",
) -> None:
    """Checks class weights against `shape`, and sample weights against `samples`."""
    if weight is not None:
        _check_real("weight", weight, input)
        classes = shape[dim : dim + 1]
        if weight.shape != classes:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)} for {name} of shape {tuple(shape)} "
                f"with classes in dimension {dim}; expected {tuple(classes)}"
            )
    if sample_weight is not None:
        _check_real("sample_weight", sample_weight, input)
        missing = len(samples) - sample_weight.dim()
        if missing < 0 or any(
            size not in (full, 1)
            for size, full in zip(sample_weight.shape, samples[missing:], strict=True)
        ):
            raise ValueError(
                f"sample_weight: got shape {tuple(sample_weight.shape)}; "
                f"expected one that broadcasts to {tuple(samples)}"
            )


def check_classes(target: Tensor, num_classes: int, ignore_index: int) -> Classes:
    """The class indices of `target`, checked if reading them costs no device sync."""
    can_read = can_read_values(target)
    if can_read and _are_within(to_int64(target), num_classes, ignore_index):
        return Classes(target, num_classes, ignore_index=None, all_valid=True)
    unchecked = Classes(target, num_classes, ignore_index)
    if not can_read:
        return unchecked
    valid: Any = unchecked.valid_or_ignored
    if _truth(valid.all()):
        return Classes(target, num_classes, ignore_index, all_valid=True)
    position = _first(~valid)
    if position is None:
        return unchecked
    raise invalid_class(target, position, num_classes, ignore_index)


def invalid_class(
    target: Tensor, position: tuple[int, ...] | int, num_classes: int, ignore_index: int
) -> IndexError:
    """The IndexError for an invalid class. `position` may be a flat index."""
    if isinstance(position, int):
        indices = torch.unravel_index(torch.tensor(position, device=target.device), target.shape)
        position = tuple(int(index) for index in indices)
    return IndexError(
        f"target: got class {target[position].item()} at position {position}; "
        f"expected 0 to {num_classes - 1}, or ignore_index={ignore_index}"
    )


def check_values(
    call: Call, arguments: Arguments, classes: Classes | None, *, is_whole: bool = True
) -> None:
    """Checks values under `torch.autograd.detect_anomaly()`: errors, and suspicious input.

    Samples that are ignored or have weight 0 are not checked. If `is_whole` is False, `input` is a
    shard of each row, so sums over rows are not checked.
    """
    input, target, _, sample_weight = arguments
    domain = call.loss.domain
    if domain == "real" or not (can_read_values(input) and torch.is_anomaly_enabled()):
        return
    dim, from_logits = call.dim, domain == "logit"
    input = input.detach()
    not_ignored = None if classes is None else classes.not_ignored
    if not_ignored is None:
        not_ignored = torch.ones(samples_shape(input, dim), dtype=torch.bool, device=input.device)
    counts = not_ignored if sample_weight is None else not_ignored & (sample_weight.detach() != 0)
    if not from_logits:
        rounding = 4 * torch.finfo(input.dtype).eps
        # log(y + δ) is NaN below −δ, and 0 · NaN is NaN, so samples of weight 0 are checked too.
        is_negative = (input < -min(rounding, call.delta)) & not_ignored.unsqueeze(dim)
        position = _first(is_negative | (input > 1 + rounding) & counts.unsqueeze(dim))
        if position is not None:
            raise ValueError(
                f"input: got {input[position].item():g} at position {position}, which is not a "
                f"probability; expected 0 to 1 (for logits, pass from_logits=True)"
            )
    if not is_whole or call.is_per_element:  # Rows need not be distributions.
        return
    _check_softmax(input, dim, counts, from_logits)
    if classes is None:
        _check_soft_target(target, dim, counts)


def check_target_values(call: Call, target: Tensor, sample_weight: Tensor | None) -> None:
    """`check_values` for the linear loss, which has no logits to check: soft targets only."""
    if call.is_index or not (can_read_values(target) and torch.is_anomaly_enabled()):
        return
    counts = torch.ones(samples_shape(target, call.dim), dtype=torch.bool, device=target.device)
    if sample_weight is not None:
        counts = counts & (sample_weight.detach() != 0)
    _check_soft_target(target, call.dim, counts)


def _check_soft_target(target: Tensor, dim: int, counts: Tensor) -> None:
    target = target.detach()
    position = _first(counts & ~_is_distribution(target, dim, 1e-2))
    if position is not None:
        warn(
            f"target: the row at position {position} is not a probability distribution, with "
            f"values {_range(target, dim, position)}; expected values of at least 0 that sum "
            f"to 1 over dimension {dim} (for logits of a teacher, pass their softmax)"
        )


def _check_softmax(input: Tensor, dim: int, counts: Tensor, from_logits: bool) -> None:
    """Warns of a second softmax, and of one over another dimension than `dim`."""
    seen = counts & ~input.isnan().any(dim)  # Skip rows with NaN.
    position = _first(seen)
    if input.shape[dim] < 2 or position is None:
        return
    if _are_distributions(input, dim, seen):
        if from_logits:
            warn(
                f"input: every row is a probability distribution already (that at position "
                f"{position} has values {_range(input, dim, position)}), and from_logits=True "
                f"takes the softmax once more; pass the logits, or from_logits=False"
            )
        return
    for other in range(input.dim()):
        if other == dim or input.shape[other] < 2:  # A sum of one value tells nothing.
            continue
        if _are_distributions(input, other, ~input.isnan().any(other)):
            remedy = "pass the logits" if from_logits else f"take the softmax over dimension {dim}"
            warn(
                f"input: its values are probabilities that sum to 1 over dimension {other}, but "
                f"the classes are in dimension {dim}; {remedy}, or pass dim={other}"
            )
            return


def _check_real(name: str, value: Tensor, input: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; expected a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: got {kind}; expected a dense tensor (to_dense, to_padded_tensor)")
    if value.is_complex() or value.is_quantized:
        raise TypeError(f"{name}: got dtype {value.dtype}; expected a real dtype")
    if input is not None and value.device != input.device:
        raise ValueError(
            f"{name}: got device {value.device}; expected {input.device}, the input's device"
        )


def can_read_values(tensor: Tensor) -> bool:
    """True if reading values is possible, and costs no device sync or the user asked for it."""
    if is_traced():
        return False
    return tensor.is_cpu or torch.is_anomaly_enabled()


def _are_within(label: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether all labels are known to be in range and not ignored. Most targets are: one call."""
    if label.numel() == 0:
        return False
    try:
        least, greatest = (bound.item() for bound in torch.aminmax(label))
    except RuntimeError:
        if _must_have_values(label):
            raise
        return False
    return bool(0 <= least <= greatest < num_classes and not least <= ignore_index <= greatest)


def _truth(condition: Tensor) -> bool | None:
    """The value of a one-element condition, or None where it cannot be read.

    Tensors under vmap, fake tensors and traced tensors raise a RuntimeError.
    """
    try:
        return bool(condition)
    except RuntimeError:
        if _must_have_values(condition):
            raise
        return None


def _must_have_values(tensor: Tensor) -> bool:
    """Whether an error must come from elsewhere, such as a signal handler."""
    return type(tensor) in PLAIN and not is_transformed()


def _first(condition: Tensor) -> tuple[int, ...] | None:
    """The first position where the condition holds; None if it never does or cannot be read."""
    if not _truth(condition.any()):
        return None
    return tuple(condition.nonzero()[0].tolist())


def _is_distribution(values: Tensor, dim: int, rounding: float) -> Tensor:
    """Whether each row is non-negative and sums to 1, up to `rounding` and that of its dtype."""
    least = -1e-4  # 1 minus a sum over many classes can be as low.
    if values.is_floating_point():
        eps = torch.finfo(values.dtype).eps
        least, rounding = min(least, -eps), max(rounding, 2 * eps)
    values = values.double()
    return (values >= least).all(dim) & ((values.sum(dim) - 1).abs() <= rounding)


def _are_distributions(values: Tensor, dim: int, seen: Tensor) -> bool:
    """Whether every row in `seen` is a distribution, and there is at least one."""
    # A few rows may come close by chance.
    rounding = 1e-2 if _truth(seen.sum() > 3) else 1e-5
    is_one = _is_distribution(values, dim, rounding) | ~seen
    return bool(_truth(seen.any()) and _truth(is_one.all()))


def _range(values: Tensor, dim: int, position: tuple[int, ...]) -> str:
    row = values.movedim(dim, -1)[position].double()
    return f"from {row.min().item():g} to {row.max().item():g} and a sum of {row.sum().item():g}"
