"""Losses of DTensors: each process computes its shard, and only numbers per sample travel.

A shard with whole rows is a batch of its own, which the plain loss serves. If the class dimension
is cut, each process computes its classes' share of the loss, and the maximum and normaliser of a
row of logits are all-reduced.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from torchlosses import checks, formulas, linear, ops
from torchlosses.formulas import Arguments, Call, Classes, ClassPosition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


_PLAIN = (*checks.PLAIN, type(None))


def is_sharded(*tensors: Tensor | None) -> bool:
    """Whether any tensor is a DTensor, or wraps one under a transform of torch.func."""
    if _are_transformed():
        tensors = tuple(_unwrapped(tensor) for tensor in tensors)
    return any(_is_dtensor(tensor) for tensor in tensors if type(tensor) not in _PLAIN)


def _is_dtensor(argument: Any) -> bool:
    return _is_a(argument, "torch.distributed.tensor", "DTensor")


def _is_pending(argument: Any) -> bool:
    # Private, but `to_local` returns it while a collective runs.
    return _is_a(argument, "torch.distributed._functional_collectives", "AsyncCollectiveTensor")


def _is_a(argument: Any, module: str, name: str) -> bool:
    # Not imported, which would take long: a tensor of this type implies that it has been.
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(argument, kind)


def _are_transformed() -> bool:
    return not torch.compiler.is_compiling() and bool(checks.are_transforms_active())


# Private, without a public twin. Without it torch itself refuses such a DTensor.
_is_wrapped: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False
)


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    while tensor is not None and _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class _Wait(Function):
    """Waits for a tensor that a collective is computing, with a gradient: `wait` detaches.

    Writes to the tensor do not change the version of what it holds, so it is saved itself.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.save_for_backward(tensor)
        waited: Tensor = tensor.wait()
        return waited.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors  # Raises if it has changed.
        return grad


Tensors = TypeVar("Tensors", bound=tuple[Any, ...])


def wait_all(arguments: Tensors) -> Tensors:
    """The arguments, with results of pending collectives as plain tensors, which kernels serve."""
    if not any(_is_pending(a) for a in arguments if type(a) not in _PLAIN):
        return arguments
    return cast("Tensors", tuple(_waited(a) if _is_pending(a) else a for a in arguments))


def _waited(tensor: Tensor) -> Tensor:
    if checks.is_eager() and (tensor.requires_grad or not torch.is_grad_enabled()):
        waited: Tensor = _Wait.apply(tensor)
        return waited
    return tensor.clone()  # A change of the tensor itself does not matter to it.


class _Saved(Function):
    """Saves the arguments of a loss themselves.

    Writes to a DTensor do not change the version of the shard that the loss was computed from, so
    autograd would miss them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *arguments: Tensor | None) -> Tensor:
        ctx.save_for_backward(*arguments)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors  # Raises if one of them has changed.
        return grad, *(None for _ in arguments)


def compute(call: Call, arguments: Arguments) -> Tensor:
    """The loss."""
    return _compute_by(lambda call, *tensors: _compute(call, Arguments(*tensors)), call, arguments)


def compute_linear(call: Call, *arguments: Any) -> Tensor:
    """The loss of a linear layer's logits, cut by class like its weight, or by row."""
    return _compute_by(_compute_linear, call, arguments)


def _compute_by(function: Callable[..., Tensor], call: Call, arguments: Sequence[Any]) -> Tensor:
    if _are_transformed():
        raise NotImplementedError(
            "torch.func: got a transform of a loss of DTensors; expected backward or "
            "torch.autograd.grad, which give its first derivative"
        )
    meshes = [argument.device_mesh for argument in arguments if _is_dtensor(argument)]
    if all(mesh.get_coordinate() is None for mesh in meshes):
        function = _compute_outside
    loss = function(call, *arguments)
    if loss.requires_grad and checks.is_eager():
        loss = _Saved.apply(loss, *arguments)
    return loss


def _compute_outside(call: Call, input: Tensor, *rest: Any) -> Tensor:
    """The loss in a process outside of the mesh, where DTensors have a shape and no values."""
    losses = input if call.is_per_element else input.sum(call.dim)
    losses = losses.to(call.dtype)
    if call.reduction != "none":
        losses = losses.sum()
    for other in rest:  # They have gradients too.
        if _is_dtensor(other) and other.requires_grad:
            losses = losses + other.sum()
    whole: Any = losses
    return _reduced(whole)


def _compute(call: Call, arguments: Arguments, layer: "Layer | None" = None) -> Tensor:
    """The loss. With a `layer`, the input stands in for its logits and has no values."""
    shards = Shards(arguments.input, call.dim)
    arguments = shards.parts(call, arguments)
    is_whole = not any(shards.is_cut) or (call.is_per_element and not call.is_index)
    classes = position = None
    try:
        if call.is_index:
            classes = checks.check_classes(arguments.target, shards.num_classes, call.ignore_index)
            position = shards.find_position(classes)
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            if layer is None:
                checks.check_values(call, arguments, classes, is_whole=is_whole)
            elif is_whole:
                checks.check_target_values(call, arguments.target, arguments.sample_weight)
        compute = _compute_whole_rows if is_whole else _compute_cut_rows
        loss = compute(call, arguments, shards, classes, position, layer)
    except (IndexError, ValueError) as error:
        error.add_note("The position is one in the shard of this process.")
        raise
    if call.reduction == "none":
        return shards.join(loss, shards.loss_dims(call))
    return shards.replicated(loss)


def _compute_whole_rows(
    call: Call,
    arguments: Arguments,
    shards: "Shards",
    classes: Classes | None,
    position: ClassPosition | None,
    layer: "Layer | None",
) -> Tensor:
    """The loss if each process has whole rows: its shard is a batch of its own."""
    like = arguments.input.new_empty((), dtype=call.dtype)
    divisor = formulas.find_divisor(call, like, shards, arguments, classes, position)
    if arguments.sample_weight is not None and call.reduction == "mean":
        weights, divisor = formulas.lift(arguments.sample_weight.to(call.dtype), divisor)
        arguments = arguments._replace(sample_weight=weights)
    part = call._replace(reduction="none" if call.reduction == "none" else "sum")
    if layer is None:
        loss = ops.compute(part, arguments, ops.key_of(part.kind, part, arguments))
    else:
        loss = linear.compute(part, *layer, *arguments[1:])
    return loss if call.reduction == "none" else formulas.divide(shards.total(loss), divisor)


def _compute_cut_rows(
    call: Call,
    arguments: Arguments,
    shards: "Shards",
    classes: Classes | None,
    position: ClassPosition | None,
    layer: "Layer | None",
) -> Tensor:
    """The loss if several processes share the classes of a row."""
    if layer is None:
        losses = formulas.unreduced_losses(call, arguments, shards, classes, position)
    else:
        losses = linear.unreduced_losses(call, *layer, *arguments[1:3], shards, classes, position)
    return formulas.reduce(call, losses, shards, arguments, classes, position)


def _compute_linear(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not (isinstance(input, DTensor) and isinstance(linear_weight, DTensor)):
        is_input = isinstance(linear_weight, DTensor)
        raise ValueError(
            f"{'input' if is_input else 'linear_weight'}: got a plain tensor beside a DTensor; "
            f"expected a DTensor too, or a layer that is whole, as fully_shard makes it in the "
            f"forward of the module that it is called on"
        )
    mesh = linear_weight.device_mesh
    for name, tensor in (("input", input), ("linear_bias", linear_bias)):
        if isinstance(tensor, DTensor) and tensor.device_mesh != mesh:
            raise ValueError(
                f"{name}: got {tensor.device_mesh}; expected {mesh}, the mesh of linear_weight"
            )
    by_class = linear_weight.placements
    if any(p not in (Shard(0), Replicate()) for p in by_class):
        raise ValueError(
            f"linear_weight: got placements {by_class}; expected Shard(0), by class, or Replicate"
        )
    # A pending sum is computed now: the loss is not linear.
    by_row = [Replicate() if p.is_partial() else p for p in input.placements]
    for p, q in zip(by_row, by_class, strict=True):
        if _is_cut(p, call.dim) or not (p.is_replicate() or q.is_replicate()):
            raise ValueError(
                f"input: got placements {input.placements} for a linear_weight of placements "
                f"{by_class}; expected Replicate where the weight is cut, and no features cut"
            )
    if linear_bias is not None and not isinstance(linear_bias, DTensor):
        everywhere = [Replicate()] * mesh.ndim  # The same in every process.
        linear_bias = DTensor.from_local(linear_bias, mesh, everywhere, run_check=False)
    # Replicated tensors get a share of their gradient from each process with another shard.
    shares = [Partial() if q.is_shard() else p for p, q in zip(by_row, by_class, strict=True)]
    # Redistribute first: not every pending sum, such as an embedding's, takes partial gradients.
    x = _local(input.redistribute(placements=by_row), by_row, shares)
    shares = [Partial() if _is_cut(p) else q for p, q in zip(by_row, by_class, strict=True)]
    layer = Layer(
        x,
        _local(linear_weight, by_class, shares),
        None if linear_bias is None else _local(linear_bias, by_class, shares),
    )
    shape = input.shape[:-1] + linear_weight.shape[:1]
    # A zero-stride stand-in: only its shape and placement are used.
    logits = x.new_empty(()).expand(x.shape[:-1] + layer.linear_weight.shape[:1])
    placements = [
        Shard(call.dim) if q.is_shard() else p for p, q in zip(by_row, by_class, strict=True)
    ]
    stride = torch.empty(shape, device="meta").stride()
    like = DTensor.from_local(logits, mesh, placements, run_check=False, shape=shape, stride=stride)
    return _compute(call, Arguments(like, target, weight, sample_weight), layer)


class Layer(NamedTuple):
    """The local part of a linear layer and its input."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None


class Shards(formulas.Sharding):
    """The sharding of a DTensor: its placements, and its shard in this process."""

    is_shared = True

    def __init__(self, input: Tensor, dim: int) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard, placement_types

        if not isinstance(input, DTensor):
            raise ValueError(
                f"input: got {type(input).__name__} beside a DTensor; expected a DTensor too"
            )
        # A pending sum is computed now: the loss is not linear.
        self.placements: list[Any] = [
            Replicate() if p.is_partial() else p for p in input.placements
        ]
        # Private; flattening dimensions of which one is cut makes it.
        strided = getattr(placement_types, "_StridedShard", ())
        if any(
            not isinstance(p, (Replicate, Shard)) and (not isinstance(p, strided) or p.dim == dim)
            for p in self.placements
        ):
            raise ValueError(
                f"input: got placements {input.placements}; expected Shard, Replicate or Partial, "
                f"or _StridedShard where it does not cut classes"
            )
        super().__init__(input.shape, dim)
        self.mesh = input.device_mesh
        self.is_cut = [_is_cut(p, dim) for p in self.placements]
        # Among the processes that share these rows.
        self.is_first = all(
            self.mesh.get_local_rank(i) == 0 for i, cut in enumerate(self.is_cut) if cut
        )
        self.input = _local(input, self.placements, self.placements)
        self.own_shape = self.input.shape

    def loss_dims(self, call: Call) -> tuple[int, ...]:
        """The input's dimensions that remain in the losses."""
        every = tuple(range(len(self.shape)))
        return every if call.is_per_element else every[: self.dim] + every[self.dim + 1 :]

    def parts(self, call: Call, arguments: Arguments) -> Arguments:
        """The local parts of the tensors that match the shard."""
        _, target, weight, sample_weight = arguments
        every = tuple(range(len(self.shape)))
        samples = every[: self.dim] + every[self.dim + 1 :]
        target = self.part("target", target, samples if call.is_index else every)
        if weight is not None:
            weight = self.part("weight", weight, (self.dim,))
        if sample_weight is not None:
            weight_dims = samples if call.is_index else self.loss_dims(call)
            aligned = weight_dims[len(weight_dims) - sample_weight.dim() :]
            sample_weight = self.part("sample_weight", sample_weight, aligned)
        return Arguments(self.input, target, weight, sample_weight)

    def part(self, name: str, tensor: Tensor, dims: Sequence[int]) -> Tensor:
        """The local part of a tensor whose dimensions are the input's `dims`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not isinstance(tensor, DTensor):  # The same in every process.
            everywhere = [Replicate()] * self.mesh.ndim
            tensor = DTensor.from_local(tensor, self.mesh, everywhere, run_check=False)
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name}: got {tensor.device_mesh}; expected {self.mesh}, the input's mesh"
            )
        # Every process has a dimension that broadcasts.
        own = {d: i for i, d in enumerate(dims) if tensor.shape[i] == self.shape[d]}
        placements = [
            _along(p, own[p.dim]) if _is_cut(p) and p.dim in own else Replicate()
            for p in self.placements
        ]
        if any(
            p not in (q, Replicate()) for p, q in zip(tensor.placements, placements, strict=True)
        ):
            raise ValueError(
                f"{name}: got placements {tensor.placements} for an input of placements "
                f"{tuple(self.placements)}; expected {tuple(placements)}, or Replicate"
            )
        # Replicated tensors get a share of their gradient from each process with another shard.
        gradients = [
            Partial() if _is_cut(p) and q.is_replicate() else q
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

    def find_position(self, classes: Classes) -> ClassPosition:
        """The indices of the classes in the shard. Every shard has an invalid class."""
        ids = torch.arange(self.num_classes, device=self.input.device)
        ids = self.part("input", ids, (self.dim,))
        index = classes.label - ids[:1].sum()  # The first of them, if there is one.
        is_here = (index >= 0) & (index < len(ids))
        if classes.valid_or_ignored is not None:
            is_here = is_here | ~classes.valid_or_ignored
        if classes.not_ignored is not None:
            is_here = is_here & classes.not_ignored
        index = index.clamp(0, max(len(ids) - 1, 0))
        return ClassPosition(index.unsqueeze(self.dim), self.dim, is_here)

    def over_classes(self, values: Tensor, operation: str = "sum") -> Tensor:
        """The sum or the maximum over the processes that share these rows."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        # Along other dimensions of the mesh the values may differ.
        shares = [Partial(operation) if cut else Replicate() for cut in self.is_cut]
        whole = _reduced(DTensor.from_local(values, self.mesh, shares, run_check=False))
        # Each process continues with its own classes, and so has a share of the gradient.
        gradients = [Partial() if cut else Replicate() for cut in self.is_cut]
        return whole.to_local(grad_placements=gradients)

    def own_weights(self, call: Call, weights: Tensor, position: ClassPosition | None) -> Tensor:
        """The process that holds its class counts a sample, or the first of its processes."""
        if call.is_per_element:
            return weights
        if position is not None and position.is_here is not None:
            return weights.where(position.is_here, 0)
        return weights if self.is_first else torch.zeros_like(weights)

    def total(self, parts: Tensor) -> Tensor:
        return self.join(parts).to_local()

    def replicated(self, value: Tensor) -> Tensor:
        """The DTensor of a value that all processes have."""
        from torch.distributed.tensor import Replicate

        return _from_local(value, self.mesh, [Replicate()] * self.mesh.ndim, value.shape)

    def join(self, part: Tensor, dims: Sequence[int] | None = None) -> "DTensor":
        """The DTensor of the parts of all processes, whose dimensions are the input's `dims`.

        It is summed over what else the input is cut in. Without `dims` it has the part's shape.
        """
        from torch.distributed.tensor import Partial, Replicate

        placements: list[Placement] = []
        for p in self.placements:
            if not _is_cut(p):
                placements.append(Replicate())
            elif dims is not None and p.dim in dims:
                placements.append(_along(p, dims.index(p.dim)))
            else:
                placements.append(Partial())
        shape = part.shape if dims is None else torch.Size([self.shape[d] for d in dims])
        joined = _reduced(_from_local(part, self.mesh, placements, shape))
        # Compilers refuse it themselves.
        if joined.requires_grad and not torch.compiler.is_compiling():
            joined.register_hook(_refuse_second_derivative)
        return joined


def _is_cut(placement: Any, dim: int | None = None) -> bool:
    """Whether a placement without a pending sum cuts the dimension, or any."""
    return not placement.is_replicate() and (dim is None or placement.dim == dim)


def _along(placement: Any, dim: int) -> "Placement":
    """The same cut of a tensor in which the dimension is number `dim`."""
    from torch.distributed.tensor import Shard

    moved: Placement = placement
    if placement.dim != dim:  # Else unchanged: the compiler cannot trace into private placements.
        is_plain = isinstance(placement, Shard)
        moved = (
            Shard(dim) if is_plain else type(placement)(dim, split_factor=placement.split_factor)
        )
    return moved


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
    """The local shard after redistribution; its gradient returns with other placements."""
    placed = tensor.redistribute(placements=placements)
    if placed.requires_grad and not torch.compiler.is_compiling():
        # torch 2.11 gives the gradient of an uneven shard wrong strides, and then gathers it.
        placed.register_hook(
            lambda grad: _from_local(grad.to_local(), grad.device_mesh, grad.placements, grad.shape)
        )
    local = placed.to_local(grad_placements=gradients)
    return _waited(local) if _is_pending(local) else local


def _reduced(tensor: "DTensor") -> "DTensor":
    """Computes pending sums, one by one: torch warns if it computes several at once."""
    from torch.distributed.tensor import Replicate

    placements = list(tensor.placements)
    for i, placement in enumerate(placements):
        if placement.is_partial():
            placements[i] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor


def _refuse_second_derivative(grad: Tensor) -> None:
    # Some versions of torch lose it silently between a DTensor and its shards.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph: got True for a loss of DTensors; expected False, since only its first "
            "derivative is there"
        )
