"""Losses of DTensors: each process works on its shard, and only numbers per sample travel.

A shard with whole rows is a batch of its own, which the plain loss serves. Where the class
dimension is cut, a process answers for the classes that it holds: its loss is a share of a sum, and
what takes a whole row (the maximum and the normaliser of logits) is reduced over the processes.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchlosses import checks, formulas
from torchlosses.checks import Classes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is a DTensor."""
    for tensor in tensors:
        if type(tensor) is not Tensor and tensor is not None:
            # Its import takes longer than that of this package, and who has one has done it.
            module = sys.modules.get("torch.distributed.tensor")
            if module is not None and isinstance(tensor, module.DTensor):
                return True
    return False


def run(
    loss: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    dim: int,
    *,
    is_index: bool,
    is_elementwise: bool,
    sample_weight: Tensor | None,
    weight: Tensor | None = None,
    reduction: str,
    ignore_index: int,
    divisor: Tensor | float,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """The reduced loss, where `loss` is that of plain tensors.

    `divisor` is what divides the sum if nothing has a weight.
    """
    shards = Shards(input, dim)
    y = shards.input
    every = tuple(range(input.dim()))
    rows = every[:dim] + every[dim + 1 :]
    lost = every if is_elementwise else rows  # The dimensions that the losses have.
    weighted = rows if is_index else lost
    target = shards.part("target", target, rows if is_index else every)
    if weight is not None:
        weight = shards.part("weight", weight, (dim,)).to(dtype)
    if not is_elementwise:
        options["weight"] = weight
    if sample_weight is not None:
        aligned = weighted[len(weighted) - sample_weight.dim() :]
        sample_weight = shards.part("sample_weight", sample_weight, aligned)

    is_whole = not any(shards.is_cut) or (is_elementwise and not is_index)
    place = None
    try:
        if is_index:
            place = shards.find(checks.check_classes(target, input.shape[dim], ignore_index))
        if is_whole:
            losses = loss(
                y,
                target,
                dim=dim,
                reduction="none" if reduction == "none" else "sum",
                ignore_index=ignore_index,
                sample_weight=sample_weight,
                **options,
            )
        elif not options.get("from_logits", True):
            classes = None if place is None else place.classes
            checks.check_values(y, None, classes, dim, options["delta"], False, sample_weight)
    except (IndexError, ValueError) as error:
        error.add_note("The position is one in the shard of this process.")
        raise
    weights = y.new_ones((), dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    weights = weights.expand([y.shape[d] for d in weighted])
    if is_elementwise and is_index:
        weights = weights.unsqueeze(dim).expand_as(y)
    if not is_whole:
        y = y.to(dtype)
        if place is None:
            losses = _cross_entropy(y, target.to(dtype), shards, **options)
        elif is_elementwise:
            losses = _squared_error_of_class(y, place, dim)
        else:
            losses = _cross_entropy_of_class(y, place, shards, **options)
        if sample_weight is not None:
            losses = losses * weights
    if reduction == "mean" and not (sample_weight is None and place is None):
        if place is not None:
            kept = place.classes.kept
            if not is_elementwise:  # Each sample counts where its class is.
                weights = weights.where(place.is_here, 0)
            elif kept is not None:
                weights = weights.where(kept.unsqueeze(dim), 0)
            if weight is not None:
                by_class = formulas.along(weight, y, dim).expand_as(y)
                weights = weights * place.pick(by_class, dim, 0)
        elif not (is_elementwise or shards.is_first):
            weights = torch.zeros_like(weights)
        sums = torch.stack((weights.sum(), (weights != 0).sum(dtype=dtype)))
        total, count = shards.join(sums)
        divisor = total.where(count > 0, 1)  # The mean over nothing is 0.
    if reduction == "none":
        return shards.join(losses, lost)
    return shards.join(losses.sum()) / divisor


class Place(NamedTuple):
    """Where the class of each sample is in a shard; not at all where `is_here` is False."""

    classes: Classes
    position: Tensor
    is_here: Tensor

    def pick(self, values: Tensor, dim: int, otherwise: float) -> Tensor:
        """The value of each sample's class, or `otherwise` if that class lies elsewhere."""
        # Of no classes a sum, which is 0: backward has to pass where it does on other processes.
        index = self.position.unsqueeze(dim)
        picked = values.gather(dim, index).squeeze(dim) if values.shape[dim] else values.sum(dim)
        return picked.where(self.is_here, otherwise)


class Shards:
    """How an input lies on its mesh, and what goes with the shard of this process."""

    def __init__(self, input: Tensor, dim: int) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(input, DTensor):
            raise ValueError(
                f"input: got {type(input).__name__} beside a DTensor; expected a DTensor too"
            )
        # As in all operations that are not linear, a sum that is still to be made is made now.
        self.placements = [Replicate() if p.is_partial() else p for p in input.placements]
        if any(type(p) is not Replicate and type(p) is not Shard for p in self.placements):
            raise ValueError(
                f"input: got placements {input.placements}; expected Shard, Replicate or Partial"
            )
        self.mesh = input.device_mesh
        self.shape = input.shape
        self.dim = dim
        self.num_classes = input.shape[dim] if input.dim() else 1
        self.is_cut = [p.is_shard(dim) for p in self.placements]
        # Of the processes that have the same rows, and other classes of them.
        self.is_first = all(
            self.mesh.get_local_rank(i) == 0 for i, cut in enumerate(self.is_cut) if cut
        )
        self.input = _local(input, self.placements, self.placements)

    def part(self, name: str, tensor: Tensor, dims: Sequence[int]) -> Tensor:
        """What of a tensor goes with the shard. Its dimensions are the input's `dims`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if not isinstance(tensor, DTensor):  # It is the same on every process.
            everywhere = [Replicate()] * self.mesh.ndim
            tensor = DTensor.from_local(tensor, self.mesh, everywhere, run_check=False)
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name}: got {tensor.device_mesh}; expected {self.mesh}, the input's mesh"
            )
        # A dimension that broadcasts is on every process.
        own = {d: i for i, d in enumerate(dims) if tensor.shape[i] == self.shape[d]}
        placements = [
            Shard(own[p.dim]) if isinstance(p, Shard) and p.dim in own else Replicate()
            for p in self.placements
        ]
        if any(
            p not in (q, Replicate()) for p, q in zip(tensor.placements, placements, strict=True)
        ):
            raise ValueError(
                f"{name}: got placements {tensor.placements} for an input of placements "
                f"{tuple(self.placements)}; expected {tuple(placements)}, or Replicate"
            )
        # What is the same on processes with different shards has on each a share of its gradient.
        gradients = [
            Partial() if p.is_shard() and q.is_replicate() else q
            for p, q in zip(self.placements, placements, strict=True)
        ]
        part = _local(tensor, placements, gradients)
        expected = tuple(self.input.shape[d] if d in own else 1 for d in dims)
        if part.shape != expected:
            raise ValueError(
                f"{name}: got a shard of shape {tuple(part.shape)} for an input's shard of shape "
                f"{tuple(self.input.shape)}; expected {expected}, as DTensor cuts dimensions"
            )
        return part

    def find(self, classes: Classes) -> Place:
        """Where the classes lie in the shard. One that is impossible lies in every shard."""
        ids = torch.arange(self.num_classes, device=self.input.device)
        ids = self.part("input", ids, (self.dim,))
        index = classes.label - ids[:1].sum()  # The first of them, if there is one.
        is_here = (index >= 0) & (index < len(ids))
        if classes.valid is not None:
            is_here = is_here | ~classes.valid
        if classes.kept is not None:
            is_here = is_here & classes.kept
        return Place(classes, index.clamp(0, max(len(ids) - 1, 0)), is_here)

    def over_classes(self, values: Tensor, operation: str = "sum") -> Tensor:
        """The sum or the maximum over the processes that share the rows of the shard."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        # Other dimensions of the mesh take no part: what lies there need not be the same.
        shares = [Partial(operation) if cut else Replicate() for cut in self.is_cut]
        whole = _reduced(DTensor.from_local(values, self.mesh, shares, run_check=False))
        # Each process goes on with its own classes, and has a share of the gradient too.
        gradients = [Partial() if cut else Replicate() for cut in self.is_cut]
        return whole.to_local(grad_placements=gradients)

    def shifted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`formulas.shifted`, with the maximum and the sum of whole rows."""
        shape = list(logits.shape)
        shape[self.dim] = 1
        maximum = logits.new_full(shape, -torch.inf)  # What it is where no class lies.
        if logits.shape[self.dim]:
            maximum = logits.detach().amax(self.dim, keepdim=True)
        logits = logits - self.over_classes(maximum, "max")
        return logits, self.over_classes(logits.exp().sum(self.dim, keepdim=True)).log()

    def join(self, part: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """The DTensor of which each process has a part, with the input's `dims`.

        It is summed over what else the input is cut in. Without `dims` it has the part's shape.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        placements: list[Placement] = []
        for p in self.placements:
            if not isinstance(p, Shard):
                placements.append(Replicate())
            elif dims is not None and p.dim in dims:
                placements.append(Shard(dims.index(p.dim)))
            else:
                placements.append(Partial())
        shape = part.shape if dims is None else torch.Size([self.shape[d] for d in dims])
        joined = _reduced(_from_local(part, self.mesh, placements, shape))
        # The compiler refuses it itself.
        if joined.requires_grad and not torch.compiler.is_compiling():
            joined.register_hook(_refuse_second_derivative)
        return joined


def _from_local(
    part: Tensor, mesh: "DeviceMesh", placements: "Sequence[Placement]", shape: torch.Size
) -> "DTensor":
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _local(
    tensor: "DTensor", placements: "Sequence[Placement]", gradients: "Sequence[Placement]"
) -> Tensor:
    """The shard of a tensor by other placements, and by which its gradient comes back."""
    placed = tensor.redistribute(placements=placements)
    if placed.requires_grad and not torch.compiler.is_compiling():
        # torch 2.11 gives the gradient of an uneven shard the strides of another shape, and gathers
        # it where it is accumulated.
        placed.register_hook(
            lambda grad: _from_local(grad.to_local(), grad.device_mesh, grad.placements, grad.shape)
        )
    return placed.to_local(grad_placements=gradients)


def _reduced(tensor: "DTensor") -> "DTensor":
    """The tensor with its sums made, one by one, because torch warns where it makes several."""
    from torch.distributed.tensor import Replicate

    placements = list(tensor.placements)
    for i, placement in enumerate(placements):
        if placement.is_partial():
            placements[i] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor


def _refuse_second_derivative(grad: Tensor) -> None:
    # Some versions of torch lose it silently on the way between a DTensor and its shards.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph: got True for a loss of DTensors; expected False, since only its first "
            "derivative is there"
        )


def _squared_error_of_class(input: Tensor, place: Place, dim: int) -> Tensor:
    input, _, kept = formulas.masked(input, place.classes, dim)
    if input.shape[dim]:
        minus_one = -place.is_here.to(input.dtype).unsqueeze(dim)
        input = input.scatter_add(dim, place.position.unsqueeze(dim), minus_one)
    losses = input * input / 2
    return losses if kept is None else losses.where(kept.unsqueeze(dim), 0)


def _cross_entropy(
    input: Tensor, target: Tensor, shards: Shards, *, label_smoothing: float, **options: Any
) -> Tensor:
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / shards.num_classes
    log_normalizer = None
    if options["from_logits"]:
        input, log_normalizer = shards.shifted(input)
    return formulas.cross_entropy(
        input, target, shards.dim, label_smoothing=0, log_normalizer=log_normalizer, **options
    )


def _cross_entropy_of_class(
    input: Tensor,
    place: Place,
    shards: Shards,
    *,
    weight: Tensor | None,
    delta: float,
    from_logits: bool,
    label_smoothing: float,
) -> Tensor:
    dim = shards.dim
    input, _, kept = formulas.masked(input, place.classes, dim)
    log_normalizer = None
    if from_logits:
        input, log_normalizer = shards.shifted(input)
    # Elsewhere 1, which has a logarithm and a slope, and nothing of it is left.
    picked = place.pick(input, dim, 1).unsqueeze(dim)
    losses = -formulas.guarded_log(picked, log_normalizer, delta).squeeze(dim)
    losses = losses.where(place.is_here, 0)
    if weight is not None:
        losses = losses * place.pick(formulas.along(weight, input, dim).expand_as(input), dim, 0)
    if label_smoothing:
        uniform = -formulas.guarded_log(input, log_normalizer, delta)
        if weight is not None:
            uniform = uniform * formulas.along(weight, uniform, dim)
        uniform = label_smoothing / shards.num_classes * uniform.sum(dim)
        losses = uniform if label_smoothing == 1 else (1 - label_smoothing) * losses + uniform
    return losses if kept is None else losses.where(kept, 0)
