"""Every complaint about options, shapes, dtypes, devices and values.

A message names the argument, what it got, and what it should be.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean", "batchmean", "none")


class Classes(NamedTuple):
    """A target of class indices, and what is known of it without a wait for a device.

    `ignore_index` is None where no sample is seen to be ignored; `is_valid` says whether every
    other sample is seen to name a class.
    """

    target: Tensor
    num_classes: int
    ignore_index: int | None
    is_valid: bool

    @property
    def kept(self) -> Tensor | None:
        """False where a sample is ignored; None stands for True everywhere, here and below."""
        return None if self.ignore_index is None else _long(self.target) != self.ignore_index

    @property
    def valid(self) -> Tensor | None:
        """False where a sample that is kept names no class."""
        if self.is_valid:
            return None
        kept = self.kept
        return self._within if kept is None else self._within | ~kept

    @property
    def label(self) -> Tensor:
        """The classes, and 0 where there is none: safe to gather with."""
        label = _long(self.target)
        if self.is_valid and self.ignore_index is None:
            return label
        return label.where(self._within, 0)

    @property
    def _within(self) -> Tensor:
        label = _long(self.target)
        return (label >= 0) & (label < self.num_classes)


def check_options(
    reduction: str,
    dim: int | None,
    ignore_index: int,
    delta: float = 0.0,
    label_smoothing: float = 0.0,
) -> None:
    if reduction not in REDUCTIONS:
        expected = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction: got {reduction!r}; expected one of {expected}")
    if dim is not None and not isinstance(dim, int):
        raise TypeError(f"dim: got {dim!r}; expected an int or None")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}; expected an int")
    if not isinstance(delta, (int, float)):
        raise TypeError(f"delta: got {delta!r}; expected a number")
    if not 0 <= delta < math.inf:
        raise ValueError(f"delta: got {delta!r}; expected a finite number of at least 0")
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: got {label_smoothing!r}; expected a number")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}; expected a number in [0, 1]")


def check_dim(input: Tensor, dim: int | None) -> int:
    """The class dimension, counted from the front."""
    _check_real("input", input, None)
    if not input.is_floating_point():
        raise TypeError(f"input: got dtype {input.dtype}; expected a floating dtype")
    if dim is None:
        return 1 if input.dim() > 1 else 0
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim: got {dim} for an input of shape {tuple(input.shape)}; "
            f"expected {-rank} to {rank - 1}"
        )
    return dim % rank


def is_class_index(input: Tensor, target: Tensor, dim: int) -> bool:
    """Whether `target` holds class indices; otherwise it has one value per element of `input`."""
    _check_real("target", target, input)
    if target.shape == input.shape:
        return False
    samples = samples_shape(input, dim)
    if target.shape != samples:
        fits = [d for d in range(input.dim()) if samples_shape(input, d) == target.shape]
        hint = f"; classes in dimension {fits[0]} need dim={fits[0]}" if fits else ""
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for an input of shape {tuple(input.shape)} "
            f"with classes in dimension {dim}; expected the same shape, or {tuple(samples)} of an "
            f"integer dtype for class indices{hint}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(
            f"target: got dtype {target.dtype} and shape {tuple(target.shape)} for an input of "
            f"shape {tuple(input.shape)}, where only class indices fit; expected an integer dtype, "
            f"or the input's shape (a forgotten unsqueeze?)"
        )
    return True


def samples_shape(input: Tensor, dim: int) -> torch.Size:
    """The shape of `input` without its class dimension: one entry per sample."""
    return input.shape[:dim] + input.shape[dim + 1 :]


def check_weight(weight: Tensor | None) -> None:
    """What can be said of class weights before there is an input."""
    if weight is not None:
        _check_real("weight", weight, None)
        if weight.dim() != 1:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}; expected (C,), one weight per class"
            )


def check_weights(
    input: Tensor,
    weight: Tensor | None,
    dim: int,
    sample_weight: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Class weights against the input, sample weights against the `shape` they broadcast to."""
    if weight is not None:
        _check_real("weight", weight, input)
        if weight.shape != input.shape[dim : dim + 1]:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)} for an input of shape "
                f"{tuple(input.shape)} with classes in dimension {dim}; "
                f"expected {tuple(input.shape[dim : dim + 1])}"
            )
    if sample_weight is not None:
        _check_real("sample_weight", sample_weight, input)
        missing = len(shape) - sample_weight.dim()
        if missing < 0 or any(
            size not in (1, full)
            for size, full in zip(sample_weight.shape, shape[missing:], strict=True)
        ):
            raise ValueError(
                f"sample_weight: got shape {tuple(sample_weight.shape)}; "
                f"expected one that broadcasts to {tuple(shape)}"
            )


def check_classes(target: Tensor, num_classes: int, ignore_index: int) -> Classes:
    """The class indices of `target`, looked at where that costs no wait for a device."""
    can_look = _can_look(target)
    if can_look and _are_within(_long(target), num_classes, ignore_index):
        return Classes(target, num_classes, ignore_index=None, is_valid=True)
    unseen = Classes(target, num_classes, ignore_index, is_valid=False)
    if not can_look:
        return unseen
    valid: Any = unseen.valid
    if _truth(valid.all()):
        return Classes(target, num_classes, ignore_index, is_valid=True)
    position = _first(~valid)
    if position is None:
        return unseen
    raise IndexError(
        f"target: got class {target[position].item()} at position {position}; "
        f"expected 0 to {num_classes - 1}, or ignore_index={ignore_index}"
    )


def check_values(
    input: Tensor,
    target: Tensor | None,
    classes: Classes | None,
    dim: int,
    delta: float,
    from_logits: bool,
    sample_weight: Tensor | None,
) -> None:
    """Values that cannot be right, or are suspicious; a pass over the data, so only on request.

    The request is PyTorch's own debug switch, `torch.autograd.detect_anomaly()`. `target` is None
    where the targets are class indices. Samples that count for nothing may hold anything.
    """
    if not (_can_look(input) and torch.is_anomaly_enabled()):
        return
    input = input.detach()
    kept = None if classes is None else classes.kept
    if kept is None:
        kept = torch.ones(samples_shape(input, dim), dtype=torch.bool, device=input.device)
    counts = kept if sample_weight is None else kept & (sample_weight.detach() != 0)
    if from_logits:
        # Few rows of logits may come close to it by chance.
        rounding = 1e-2 if kept.numel() > 3 else 1e-5
        position = _first(counts)
        is_one = _is_distribution(input, dim, rounding) | ~counts
        if input.shape[dim] > 1 and position is not None and _truth(is_one.all()):
            warnings.warn(
                f"input: every row is a probability distribution already (that at position "
                f"{position} has values {_range(input, dim, position)}), and from_logits=True "
                f"takes the softmax once more; pass the logits, or from_logits=False",
                stacklevel=3,
            )
    else:
        rounding = 4 * torch.finfo(input.dtype).eps
        # The logarithm of less than −δ is NaN, and with a weight of 0 too.
        is_negative = (input < -min(rounding, delta)) & kept.unsqueeze(dim)
        position = _first(is_negative | (input > 1 + rounding) & counts.unsqueeze(dim))
        if position is not None:
            raise ValueError(
                f"input: got {input[position].item():g} at position {position}, which is no "
                f"probability; expected 0 to 1 (for logits, pass from_logits=True)"
            )
    if target is not None:
        target = target.detach()
        position = _first(counts & ~_is_distribution(target, dim, 1e-2))
        if position is not None:
            warnings.warn(
                f"target: the row at position {position} is no probability distribution, with "
                f"values {_range(target, dim, position)}; expected values of at least 0 that sum "
                f"to 1 over dimension {dim} (for logits of a teacher, pass their softmax)",
                stacklevel=3,
            )


def _check_real(name: str, value: Tensor, input: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; expected a torch.Tensor")
    if value.is_complex():
        raise TypeError(f"{name}: got dtype {value.dtype}; expected a real dtype")
    if input is not None and value.device != input.device:
        raise ValueError(
            f"{name}: got device {value.device}; expected {input.device}, the input's device"
        )


def _can_look(tensor: Tensor) -> bool:
    # is_tracing is public, and left out of torch's type hints.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return tensor.is_cpu or torch.is_anomaly_enabled()


def _long(target: Tensor) -> Tensor:
    if target.dtype == torch.int64:  # By far the most frequent, and a small input notices a call.
        return target
    label = target.long()
    if target.dtype == torch.uint64:  # What int64 cannot hold has wrapped around: no class.
        label = label.where(label >= 0, torch.iinfo(torch.int64).max)
    return label


def _are_within(label: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether all labels are seen to be classes and none ignored: one call, as for most targets."""
    try:
        least, greatest = (bound.item() for bound in torch.aminmax(label))
    except (IndexError, RuntimeError):  # None at all, or none to look at.
        return False
    return 0 <= least <= greatest < num_classes and not least <= ignore_index <= greatest


def _truth(condition: Tensor) -> bool | None:
    """The value of a one-element condition, or None where it has none to look at.

    A tensor under vmap, a fake tensor and a tensor being traced answer with a RuntimeError.
    """
    try:
        return bool(condition)
    except RuntimeError:
        return None


def _first(condition: Tensor) -> tuple[int, ...] | None:
    """The first position where the condition holds, if there is one to be seen."""
    if not _truth(condition.any()):
        return None
    return tuple(condition.nonzero()[0].tolist())


def _is_distribution(values: Tensor, dim: int, rounding: float) -> Tensor:
    """Whether each row is at least 0 and sums to 1, but for `rounding` and that of its dtype."""
    least = -1e-4  # What 1 minus a sum over many classes can be.
    if values.is_floating_point():
        eps = torch.finfo(values.dtype).eps
        least, rounding = min(least, -eps), max(rounding, 2 * eps)
    values = values.double()
    return (values >= least).all(dim) & ((values.sum(dim) - 1).abs() <= rounding)


def _range(values: Tensor, dim: int, position: tuple[int, ...]) -> str:
    row = values.movedim(dim, -1)[position].double()
    return f"from {row.min().item():g} to {row.max().item():g} and a sum of {row.sum().item():g}"
