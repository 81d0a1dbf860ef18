"""The losses as a few lines of differentiable PyTorch each.

They run on every device, under every transform of autograd and under the compiler. Kernels are
optimisations of these formulas, and wrong where they disagree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The range of δ that float32 holds to full precision; others are computed in float64.
MIN_DELTA, MAX_DELTA = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# If log p < log δ − LOG_RANGE, then p / (p + δ), a factor of the gradient, is negligible. log p is
# clamped there, so that exp(log δ − log p) in the derivatives of logaddexp stays finite.
LOG_RANGE = {torch.float32: 80, torch.float64: 700}
LEAST_DIVISOR = 2.0**-120  # From here on 1/divisor is finite in float32, with room for a factor.


class Call(NamedTuple):
    """A checked call: its options, and what follows from the shapes and dtypes of its tensors."""

    kind: str  # A name in LOSSES.
    is_index: bool
    dim: int  # The class dimension, counted from the front.
    reduction: str
    ignore_index: int
    dtype: torch.dtype  # Of the computation and of the loss: float32 or float64.
    delta: float = 0.0
    label_smoothing: float = 0.0

    @property
    def loss(self) -> "Loss":
        return LOSSES[self.kind]

    @property
    def is_per_element(self) -> bool:
        """Whether each element has a loss, not each sample."""
        return LOSSES[self.kind].is_per_element

    @property
    def delta_fits_float32(self) -> bool:
        """Whether float32 holds δ to full precision."""
        return self.delta == 0 or MIN_DELTA <= self.delta <= MAX_DELTA


class Arguments(NamedTuple):
    """The tensors of a call."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None


# A loss, and its gradients by input and target, as far as they were asked for.
Result = tuple[Tensor, Tensor | None, Tensor | None]


class Classes(NamedTuple):
    """A target of class indices, and what is known of its values without a device sync.

    `ignore_index` is None if no sample is ignored. `all_valid`: every index that is not ignored is
    known to be in range.
    """

    target: Tensor
    num_classes: int
    ignore_index: int | None
    all_valid: bool = False

    @property
    def not_ignored(self) -> Tensor | None:
        """False where a sample is ignored; None if no sample is."""
        if self.ignore_index is None:
            return None
        return is_not_ignored(self.target, self.ignore_index)

    @property
    def valid_or_ignored(self) -> Tensor | None:
        """False where an index that is not ignored is out of range; None if none is."""
        if self.all_valid:
            return None
        not_ignored = self.not_ignored
        return self._within if not_ignored is None else self._within | ~not_ignored

    @property
    def label(self) -> Tensor:
        """The class indices, with 0 for ignored and invalid ones: safe to gather with."""
        label = to_int64(self.target)
        if self.all_valid and self.ignore_index is None:
            return label
        return label.where(self._within, 0)

    @property
    def _within(self) -> Tensor:
        label = to_int64(self.target)
        return (label >= 0) & (label < self.num_classes)


class Sharding:
    """How processes share an input: its whole shape, its class dimension, and their collectives.

    Here one process holds all of it; `sharded.Shards` is for several. `own_shape` is that of the
    part in this process.
    """

    is_shared = False

    def __init__(self, shape: Sequence[int], dim: int) -> None:
        self.shape = self.own_shape = torch.Size(shape)
        self.dim = dim
        self.num_classes = shape[dim] if len(shape) else 1

    def find_position(self, classes: Classes) -> "ClassPosition":
        return ClassPosition(classes.label.unsqueeze(self.dim), self.dim)

    def over_classes(self, values: Tensor, operation: str = "sum") -> Tensor:
        """All-reduces over the processes that hold other classes (here: none)."""
        return values

    def own_weights(self, call: Call, weights: Tensor, position: "ClassPosition | None") -> Tensor:
        """The weights of samples that this process counts, and 0 for others."""
        return weights

    def total(self, parts: Tensor) -> Tensor:
        """The sum over all processes (here: one)."""
        return parts


class ClassPosition(NamedTuple):
    """The index of each sample's class among those of this process, with the class dimension kept.

    `is_here` is False where this process does not count the sample: another holds its class, or it
    is ignored. None: this process counts all.
    """

    indices: Tensor
    dim: int
    is_here: Tensor | None = None

    def pick(self, values: Tensor, otherwise: float) -> Tensor:
        """The value of each sample's class, or `otherwise` if another process holds it."""
        if is_fused():
            picked = values.where(self.one_hot(values), 0).sum(self.dim)
        elif values.shape[self.dim]:
            picked = values.gather(self.dim, self.indices).squeeze(self.dim)
        else:  # With no classes, use the empty sum: 0, and differentiable.
            picked = values.sum(self.dim)
        return picked if self.is_here is None else picked.where(self.is_here, otherwise)

    def one_hot(self, like: Tensor) -> Tensor:
        """True at each sample's class, and nowhere if another process holds it."""
        shape = [1] * like.dim()
        shape[self.dim] = like.shape[self.dim]
        mask = torch.arange(shape[self.dim], device=like.device).view(shape) == self.indices
        return mask if self.is_here is None else mask & self.is_here.unsqueeze(self.dim)

    def weight(self, weight: Tensor) -> Tensor:
        """The class weight of each sample, or 0 if another process holds its class."""
        # Under vmap torch would read the value of a 0-D index, and fail.
        picked = weight[self.indices] if len(weight) else weight.new_zeros(self.indices.shape)
        picked = picked.squeeze(self.dim)
        return picked if self.is_here is None else picked.where(self.is_here, 0)


def compute(call: Call, arguments: Arguments, classes: Classes | None = None) -> Tensor:
    """The loss. Pass `classes` if its values are known, such as that all are valid."""
    input, target, *_ = arguments
    sharding = Sharding(input.shape, call.dim)
    if call.is_index and classes is None:
        classes = Classes(target, sharding.num_classes, call.ignore_index)
    position = None if classes is None else sharding.find_position(classes)
    losses = unreduced_losses(call, arguments, sharding, classes, position)
    return reduce(call, losses, sharding, arguments, classes, position)


def reduce(
    call: Call,
    losses: Tensor,
    sharding: Sharding,
    arguments: Arguments,
    classes: Classes | None,
    position: "ClassPosition | None",
) -> Tensor:
    """Weights the losses by sample and reduces them."""
    divisor = find_divisor(call, losses, sharding, arguments, classes, position)
    if arguments.sample_weight is not None:
        weights = arguments.sample_weight.to(losses.dtype)
        if classes is not None:  # One weight per sample.
            not_ignored = classes.not_ignored
            if not_ignored is not None:
                weights = weights.where(not_ignored, 0)
            if call.is_per_element:
                weights = weights.expand(classes.target.shape).unsqueeze(call.dim)
        if call.reduction == "mean":
            weights, divisor = lift(weights, divisor)
        losses = losses * weights
    if call.reduction == "none":
        return losses.to(call.dtype)
    return divide(sharding.total(losses.sum()), divisor).to(call.dtype)


def divide(total: Tensor, divisor: Any) -> Tensor:
    return total if divisor is None else total / divisor


def find_divisor(
    call: Call,
    like: Tensor,
    sharding: Sharding,
    arguments: Arguments,
    classes: Classes | None,
    position: "ClassPosition | None",
) -> Any:
    """The divisor of the summed losses, in the dtype and on the device of `like`; None for none."""
    if call.reduction == "batchmean" and len(sharding.shape) > 1:
        return at_least_one(sharding.shape[0], like, call.dtype)
    if call.reduction != "mean":
        return None
    weights = arguments.sample_weight
    if weights is not None:
        weights = weights.to(like.dtype)
    if arguments.weight is not None and position is not None:
        of_class = position.weight(arguments.weight.to(like.dtype))
        weights = of_class if weights is None else of_class * weights
    return _count(call, like, sharding, weights, classes, position)


def unreduced_losses(
    call: Call,
    arguments: Arguments,
    sharding: Sharding,
    classes: Classes | None,
    position: "ClassPosition | None",
) -> Tensor:
    """The losses per element or sample, before sample weights."""
    dtype = call.dtype if call.delta_fits_float32 else torch.float64
    input, weight = arguments.input.to(dtype), arguments.weight
    if weight is not None:
        weight = weight.to(dtype)
    if classes is None or position is None:
        return call.loss.formula(call, input, arguments.target.to(dtype), weight, sharding)
    not_ignored = classes.not_ignored
    losses = call.loss.formula(call, _masked(input, classes, call.dim), position, weight, sharding)
    if not_ignored is None:
        return losses
    return losses.where(not_ignored.unsqueeze(call.dim) if call.is_per_element else not_ignored, 0)


def squared_error(
    call: Call,
    input: Tensor,
    target: Tensor | ClassPosition,
    weight: Tensor | None,
    sharding: Sharding,
) -> Tensor:
    """½ (y − t)² per element. A class index stands for its one-hot row."""
    if isinstance(target, Tensor):
        difference = input - target
    elif input.shape[target.dim] == 0:
        return input
    elif is_fused():
        difference = input - target.one_hot(input).to(input.dtype)
    else:  # y − t differs from y in one element per row, so the one-hot row is never made.
        minus_one = input.new_full((), -1).expand(target.indices.shape)
        if target.is_here is not None:
            minus_one = minus_one.where(target.is_here.unsqueeze(target.dim), 0)
        difference = input.scatter_add(target.dim, target.indices, minus_one)
    return difference * (difference / 2)  # difference² would overflow first.


def cross_entropy_of_logits(
    call: Call,
    logits: Tensor,
    target: Tensor | ClassPosition,
    weight: Tensor | None,
    sharding: Sharding,
) -> Tensor:
    """`cross_entropy` with y = softmax(x)."""
    shift, log_normalizer = shifted(logits, sharding)
    return cross_entropy(call, shift, target, weight, sharding, log_normalizer)


def cross_entropy(
    call: Call,
    input: Tensor,
    target: Tensor | ClassPosition,
    weight: Tensor | None,
    sharding: Sharding,
    log_normalizer: Tensor | None = None,
) -> Tensor:
    """− Σₖ wₖ · tₖ · log(yₖ + δ) per sample, with y as in `guarded_log`."""
    dim, smoothing = call.dim, call.label_smoothing
    if sharding.num_classes == 0 and isinstance(target, ClassPosition):
        return input.sum(dim)
    share = number(smoothing, input) if smoothing else 0.0
    remaining, uniform = 1 - share, share / max(sharding.num_classes, 1)
    if isinstance(target, Tensor):
        if smoothing:
            target = remaining * target + uniform
        if call.delta == 0:  # 0·log 0 is 0.
            zero, one = (0, 1) if log_normalizer is None else (-torch.inf, log_normalizer)
            input = torch.where((target == 0) & (input == zero), one, input)
        losses = -target * guarded_log(input, log_normalizer, call.delta)
        if weight is not None:
            losses = losses * broadcast_along(weight, losses, dim)
        return losses.sum(dim)
    # 1 where another process holds the class: finite, and masked out below.
    picked = target.pick(input, 1).unsqueeze(dim)
    losses = -guarded_log(picked, log_normalizer, call.delta)
    if target.is_here is not None:
        losses = losses.where(target.is_here.unsqueeze(dim), 0)
    if weight is not None:
        losses = losses * target.weight(weight).unsqueeze(dim)
    if smoothing:  # t = (1−ε)·[k=c] + ε/C, and Σₖ over the second part reads the whole row.
        rest = -guarded_log(input, log_normalizer, call.delta)
        if weight is not None:
            rest = rest * broadcast_along(weight, rest, dim)
        rest = uniform * rest.sum(dim, keepdim=True)
        # With ε = 1 drop the class term, or 0·∞ would give NaN.
        losses = rest if smoothing == 1 else remaining * losses + rest
    return losses.squeeze(dim)


def shifted(logits: Tensor, sharding: Sharding) -> tuple[Tensor, Tensor]:
    """z = x − max x and log Σ exp z, so that log softmax(x) = z − log Σ exp z."""
    # softmax does not depend on the shift, so the maximum needs no gradient.
    if logits.shape[sharding.dim]:
        maximum = logits.detach().amax(sharding.dim, keepdim=True)
    else:  # amax of no classes is an error, but other processes may hold some.
        maximum = logits.detach().sum(sharding.dim, keepdim=True) - torch.inf
    logits = logits - sharding.over_classes(maximum, "max")
    return logits, sharding.over_classes(logits.exp().sum(sharding.dim, keepdim=True)).log()


def guarded_log(input: Tensor, log_normalizer: Tensor | None, delta: float) -> Tensor:
    """log(y + δ), where y is `input`, or exp(input − log_normalizer) from shifted logits."""
    if log_normalizer is None:
        # Add a δ of 0 too: it turns −0.0, whose derivative is −∞, into 0.
        return (input + number(delta, input)).log()
    log_p = input - log_normalizer
    if delta == 0:
        return log_p
    # By log p and log δ: differentiating through p/(p+δ) gives 0/0 where both are small.
    reach = LOG_RANGE[log_p.dtype]
    if is_symbolic(delta):
        log_delta = scalar(delta).log().to(log_p.dtype)
        return torch.logaddexp(log_p.clamp(min=log_delta - reach), log_delta)
    log_p = log_p.clamp(min=math.log(delta) - reach)
    return torch.logaddexp(log_p, log_p.new_full((1,), math.log(delta)))  # (1,) as in `number`.


class Loss(NamedTuple):
    """The properties of a loss. Code asks for them, and never compares names.

    Ignored samples get an input of 0.5, where the formula and its derivatives must be finite.
    """

    name: str  # Kernels know it by this name.
    is_per_element: bool  # One value per element, not per sample.
    domain: str  # "real", "probability" or "logit": what the input must be.
    formula: Callable[[Call, Tensor, Tensor | ClassPosition, Tensor | None, Sharding], Tensor]


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("squares", True, "real", squared_error),
        Loss("probabilities", False, "probability", cross_entropy),
        Loss("logits", False, "logit", cross_entropy_of_logits),
    )
}


def number(value: float, like: Tensor) -> Tensor | float:
    """A number as an operand for `like`, which must have a dimension."""
    # The optimiser of torch.onnx.export drops scalars within 1e-8 of 0 and within 1e-5 of 1. It
    # keeps tensors with a dimension, which would cost a kernel elsewhere.
    if is_exporting():
        return like.new_full((1,), value)
    return scalar(value) if is_symbolic(value) else value


def is_exporting() -> bool:
    """Whether the graph is recorded for another runtime."""
    # Private: in torch 2.11 the public is_exporting() is True in every compiled graph.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def is_fused() -> bool:
    """Whether a compiler fuses these operations. It fuses a mask, and not a gather's gradient."""
    return torch.compiler.is_compiling() and not is_exporting()


def is_symbolic(value: float) -> bool:
    """Whether the graph being compiled takes this number as an input."""
    if not torch.compiler.is_compiling():
        return False
    # Undocumented; the compiler has imported it.
    return not torch.fx.experimental.symbolic_shapes.has_static_value(value)


def scalar(value: float) -> Tensor:
    """A symbolic number as a CPU tensor, so no device is waited for."""
    # A product: torch.tensor(value) would compile the number in.
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def lift(weights: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and divisor, both times 2⁶⁴ if 1/divisor would overflow."""
    lift = divisor.new_ones(()).where(divisor.abs() >= LEAST_DIVISOR, 2.0**64)
    return weights * lift, divisor * lift


def at_least_one(size: Any, like: Tensor, dtype: torch.dtype) -> Any:
    """max(size, 1)."""
    if type(size) is int:
        return max(size, 1)
    # Compilers and exporters assume that an unknown size is positive, but not an unknown number.
    return like.new_full((), size, dtype=dtype).clamp(min=1)


def broadcast_along(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    return weight.view([-1 if d == dim else 1 for d in range(like.dim())])


def is_not_ignored(target: Tensor, ignore_index: int) -> Tensor:
    return to_int64(target, ignore_index) != ignore_index


def to_int64(target: Tensor, ignore_index: int | None = None) -> Tensor:
    """Class indices of any integer dtype as int64."""
    if target.dtype == torch.int64:
        return target
    label = target.long()
    if target.dtype == torch.uint64:  # Wrapped: neither a class nor ignored.
        greatest = torch.iinfo(torch.int64).max
        label = label.where(label >= 0, -1 if ignore_index == greatest else greatest)
    return label


def _masked(input: Tensor, classes: Classes, dim: int) -> Tensor:
    """`input` with NaN in invalid rows, and without gradient in ignored rows."""
    not_ignored, valid = classes.not_ignored, classes.valid_or_ignored
    if valid is not None:  # A factor makes the gradient of the whole row NaN too.
        one_or_nan = torch.where(valid, 1.0, torch.nan).to(input.dtype)
        input = input * one_or_nan.unsqueeze(dim)
    if not_ignored is not None:  # Not a factor of 0: 0 · NaN and 0 · ∞ are NaN.
        input = input.where(not_ignored.unsqueeze(dim), 0.5)  # Every loss is finite there.
    return input


def _count(
    call: Call,
    like: Tensor,
    sharding: Sharding,
    weights: Tensor | None,
    classes: Classes | None,
    position: ClassPosition | None,
) -> Any:
    """The divisor of `'mean'`: the sum of the weights, or 1 if all are 0."""
    not_ignored = None if classes is None else classes.not_ignored
    if not_ignored is None and classes is not None and sharding.is_shared:
        # Every process takes part in the sum, and another may have samples to ignore.
        not_ignored = torch.ones_like(classes.target, dtype=torch.bool)
    sizes = list(sharding.shape if weights is None and not_ignored is None else sharding.own_shape)
    num_classes: Any = 1
    if not call.is_per_element or call.is_index:
        along_classes = sizes[call.dim : call.dim + 1]
        del sizes[call.dim : call.dim + 1]
        if call.is_per_element:
            num_classes = math.prod(along_classes)
    if weights is None:
        if not_ignored is None:
            return at_least_one(math.prod(sizes) * num_classes, like, call.dtype)
        counted = sharding.own_weights(call, not_ignored, position).sum(dtype=call.dtype)
        return sharding.total(counted * num_classes).clamp(min=1)
    if not_ignored is not None:
        weights = weights.where(not_ignored, 0)
    weights = sharding.own_weights(call, weights, position)
    # Not expanded: torch would add repeated values one by one, with an error of 1% at 10⁸.
    repeats = num_classes
    for d, size in enumerate(reversed(sizes)):
        if d >= weights.dim() or weights.shape[-1 - d] != size:
            repeats = repeats * size
    sums = torch.stack((weights.sum(), (weights != 0).sum(dtype=weights.dtype)))
    total, count = sharding.total(sums * repeats)
    return total.where(count > 0, 1)
