"""Cross-entropy of a linear layer without holding all logits in memory.

For each chunk of rows: compute the logits into a reused buffer, overwrite them with their gradient,
and accumulate the gradients of input, linear weight and bias. Without kernels, eager mode computes
the formula in chunks, whose logits are recomputed in backward.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils.checkpoint import checkpoint

from torchlosses import checks, formulas, ops
from torchlosses.formulas import Arguments, Call, Classes, ClassPosition, Sharding

# Bytes per class in a chunk of logits: 1024 rows in float32, 2048 in half precision. That many rows
# keep a GPU busy: 1024 rows by 32000 classes are 2000 tiles of 128 by 128 for some 130 processors.
# They also hide the memory traffic of the linear weight's gradient, a sum that each chunk reads and
# writes. Take half precision, with a sum in float32: one read and one write are 8 bytes per element
# of the linear weight, for which a chunk of 2048 rows does 2 · 2048 operations: 512 per byte. From
# about 300 per byte on, such products are bound by arithmetic, not by memory.
CHUNK_BYTES_PER_CLASS = 2**12
# On a CPU a chunk of logits also takes at most this many bytes. So with many classes it has fewer
# rows than CHUNK_BYTES_PER_CLASS allows, but at least MIN_ROWS. With chunks of MIN_ROWS rows the
# whole loss takes a few percent longer than without this limit; with chunks of half as many rows it
# would take 10 to 15% longer.
MAX_CPU_CHUNK_BYTES = 48 * 10**6
MIN_ROWS = 256
# The most chunks whose linear-weight gradients are accumulated in half precision: the error is less
# than twice that of rounding the finished sum once. Each chunk rounds the sum, with an error
# proportional to it. A sum of random terms grows as a square root, so of n chunks the error of
# chunk k is √(k/n) times that of the last one, and all together are √(Σ k/n) = √((n + 1)/2) times
# that of the last one: 1.9 times for six.
MAX_HALF_CHUNKS = 6
MAX_PLANS = 64
# Classes per block when a product in half precision is added to a sum in float32: the product of a
# block is still in the cache.
BLOCK = 4096


# Read before another library replaces it.
LINEAR_FORWARD = nn.Linear.forward
# Private, like the hooks of a module: torch has no public way to list them.
has_global_hook: Callable[[], int] = getattr(module, "_has_any_global_hook", checks.assume_yes)


def is_unmodified(layer: nn.Module) -> bool:
    """Whether calling the layer is F.linear on its weight and bias, and nothing else."""
    return (
        getattr(type(layer), "forward", None) is LINEAR_FORWARD  # A scripted layer has none.
        and type(layer).__call__ is nn.Module.__call__  # torch.fx replaces it.
        and "forward" not in vars(layer)  # accelerate's offloading sets it.
        and not (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or has_global_hook()
        )
    )


def compute(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss of a linear layer's logits, in chunks of rows where possible."""
    dtype = product_dtype(input)
    tensors = (input, linear_weight, linear_bias, target, weight, sample_weight)
    if (
        torch.compiler.is_compiling()
        and ops.serves_graph(input.device, call, tensors)
        and 0 not in linear_weight.shape  # The operator serves an empty input, but no empty weight.
    ):
        return LOSS_OPERATOR(call, (dtype,), *tensors)
    if not all(tensor is None or type(tensor) in checks.PLAIN for tensor in tensors):
        return formula(dtype, call, *tensors)
    classes = None
    # Not left to the kernels: their error would name a sample by its index in a chunk.
    if call.is_index:
        classes = checks.check_classes(target, linear_weight.shape[0], call.ignore_index)
    key = ops.key_of("linear", (call, dtype), tensors)
    prepared = ops.find(key) or ops.prepare(key, call, tensors, LayerKernels, formula, (dtype,))
    loss = None if prepared is None else ops.run(prepared, tensors)
    if loss is not None:
        return loss
    if not checks.is_eager():
        return formula(dtype, call, *tensors)
    # Not sharded: one process holds the whole input.
    sharding = Sharding(input.shape[:-1] + linear_weight.shape[:1], call.dim)
    position = None if classes is None else sharding.find_position(classes)
    losses = unreduced_losses(
        call, input, linear_weight, linear_bias, target, weight, sharding, classes, position
    )
    arguments = Arguments(input, target, weight, sample_weight)
    return formulas.reduce(call, losses, sharding, arguments, classes, position)


class LayerKernels(NamedTuple):
    """Kernels for a linear layer and its loss, on top of those of the loss."""

    dtype: torch.dtype  # In which F.linear would multiply.
    kernels: ops.Kernels

    @property
    def LOSSES(self) -> Sequence[str]:  # noqa: N802
        return self.kernels.LOSSES

    @property
    def CAN_FAIL(self) -> bool:  # noqa: N802
        return self.kernels.CAN_FAIL

    def prepare(self, call: Call, *tensors: Any) -> "LayerPlan":
        return LayerPlan(call, self.kernels, self.dtype, *tensors)


class LayerPlan:
    """Computes calls whose tensors have the same layout."""

    def __init__(
        self, call: Call, kernels: ops.Kernels, dtype: torch.dtype, input: Tensor, *rest: Any
    ) -> None:
        self.call, self.kernels = call, kernels
        self.dtype = dtype if has_fast_matmul(input.device, dtype) else torch.float32
        is_unreduced = call.reduction == "none"
        # The divisor is that of the whole batch; chunks compute plain sums.
        self.chunk_call = call._replace(dim=1, reduction="none" if is_unreduced else "sum")
        self.plans: dict[Any, ops.Plan] = {}  # By the layout of a chunk.

    def rescale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, target: Tensor
    ) -> Sequence[Tensor | None] | None:
        if not self.plans:  # Every row is ignored, and zeros stay zeros.
            return [gradient if gradient is None else gradient.data for gradient in gradients]
        plan = next(iter(self.plans.values()))  # Any will do: `rescale` depends on no layout.
        grad_input, *rest = gradients
        if grad_input is None:
            return plan.rescale(gradients, upstream, target)
        flat = grad_input.view(-1, grad_input.shape[-1])
        targets = target.reshape(len(flat), *target.shape[grad_input.dim() - 1 :])
        rescaled = plan.rescale([flat, *rest], upstream, targets)
        return rescaled and [grad_input.data, *rescaled[1:]]

    def compute(self, input: Tensor, *rest: Any) -> list[Any]:
        """As in `ops.Plan`: the loss, and gradients times `upstream`."""
        # Dtypes are chosen explicitly.
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            return self._compute(input, *rest)

    def _compute(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        needs: Sequence[bool],
        upstream: Tensor | None = None,
        *_: bool,
    ) -> list[Any]:
        call, dtype, num_classes = self.call, self.dtype, len(linear_weight)
        arguments = Arguments(input, target, weight, sample_weight)
        batch, divisor = _make_batch(call, num_classes, arguments, upstream)
        w = linear_weight.to(dtype)
        b = None if linear_bias is None else linear_bias.to(dtype)
        step, sum_dtype = plan_chunks(batch.num_rows, linear_weight, dtype, needs[1])
        gradients = LayerGradients(needs, batch, w, sum_dtype)
        logits = input.new_empty((step, num_classes), dtype=dtype)
        losses, in_place = [], True
        raise_on_invalid = False  # Eager calls have been checked; graphs raise nothing.
        x = z = grad_z = logits  # For `del`, if there is no chunk.
        for start in range(0, batch.num_rows, step):
            x, t, s, u = batch.part(start, step, dtype)
            z = logits[: len(x)]
            if b is None:
                torch.mm(x, w.t(), out=z)
            else:
                torch.addmm(b, x, w.t(), out=z)
            loss, grad_z, grad_t = self._find_plan(z, t, weight, s).compute(
                z, t, weight, s, (any(needs[:3]), needs[3]), u, in_place, raise_on_invalid
            )
            losses.append(loss)
            gradients.add(start, step, x, grad_z, grad_t)
        del logits, w, x, z, grad_z  # Free them before the cast of the linear weight's gradient.
        loss = self._loss(batch, losses, divisor)
        return [loss, *gradients.finish(input, linear_weight, linear_bias, target)]

    def _find_plan(self, z: Tensor, t: Tensor, weight: Tensor | None, s: Tensor | None) -> ops.Plan:
        layout = ops.layout_of((z, t, weight, s))
        plan = self.plans.get(layout)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:  # Ignored rows are left out, so layouts vary.
                self.plans.clear()
            plan = self.plans[layout] = self.kernels.prepare(self.chunk_call, z, t, weight, s)
        return plan

    def _loss(self, batch: "Batch", losses: list[Tensor], divisor: Any) -> Tensor:
        zero = batch.x.new_zeros((), dtype=self.call.dtype)
        if self.call.reduction != "none":
            total = torch.stack(losses).sum() if losses else zero
            return formulas.divide(total, divisor)
        whole = zero.new_zeros(len(batch.x))
        if losses:
            whole[slice(None) if batch.kept_rows is None else batch.kept_rows] = torch.cat(losses)
        return whole.view(batch.samples)


class Batch(NamedTuple):
    """The samples of a linear layer's input as rows, with their targets and weights."""

    samples: torch.Size
    x: Tensor
    target: Tensor
    sample_weight: Tensor | None
    upstream: Tensor | None  # Per row, or one for all.
    # A mask, if labels cannot be read without a device sync: all rows are computed, ignored ones
    # with an input of 0. Else None.
    not_ignored: Tensor | None
    # The indices of the rows to compute, if labels can be read and some are ignored. Else None.
    kept_rows: Tensor | None

    @property
    def num_rows(self) -> int:
        return len(self.x if self.kept_rows is None else self.kept_rows)

    def index_of(self, start: int, step: int) -> Any:
        """The index of a chunk."""
        if self.kept_rows is None:
            return slice(start, min(start + step, len(self.x)))
        return self.kept_rows[start : start + step]

    def part(self, start: int, step: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Inputs, targets, sample weights and upstream gradients of a chunk."""
        rows = self.index_of(start, step)
        x, s, u = self.x[rows].to(dtype), self.sample_weight, self.upstream
        if self.not_ignored is not None:  # 0 · ∞ of an ignored row is NaN.
            x = x.where(self.not_ignored[rows], 0)
        s = None if s is None else s[rows]
        return x, self.target[rows], s, u if u is None or u.dim() == 0 else u[rows]


def _make_batch(
    call: Call, num_classes: int, arguments: Arguments, upstream: Tensor | None
) -> tuple[Batch, Any]:
    """The rows of a call, with upstream gradients divided by the divisor, and the divisor."""
    input, target, _, sample_weight = arguments
    samples = input.shape[:-1]
    like = input.new_empty((), dtype=call.dtype)
    x = input.reshape(samples.numel(), input.shape[-1])
    t = target.reshape(len(x), *target.shape[len(samples) :])
    s = None if sample_weight is None else sample_weight.expand(samples).reshape(-1)
    sharding = Sharding((*samples, num_classes), call.dim)
    classes = position = not_ignored = kept_rows = None
    if call.is_index:
        classes = Classes(target, num_classes, call.ignore_index)
        position = sharding.find_position(classes)
        not_ignored = formulas.is_not_ignored(t, call.ignore_index).unsqueeze(1)
        if checks.can_read_values(t):
            kept_rows = None if not_ignored.all() else not_ignored.nonzero()[:, 0]
            not_ignored = None
    divisor = formulas.find_divisor(call, like, sharding, arguments, classes, position)
    if s is not None and call.reduction == "mean":
        s, divisor = formulas.lift(s.to(like.dtype), divisor)
    if divisor is not None:
        upstream = (like.new_ones(()) if upstream is None else upstream) / divisor
    elif upstream is not None and call.reduction == "none":
        upstream = upstream.reshape(-1)
    return Batch(samples, x, t, s, upstream, not_ignored, kept_rows), divisor


class LayerGradients:
    """Accumulates the needed gradients of input, linear weight, bias and target by chunks.

    The linear weight's is accumulated in `sum_dtype`, and the bias's in float32 at least.
    """

    def __init__(
        self, needs: Sequence[bool], batch: Batch, w: Tensor, sum_dtype: torch.dtype
    ) -> None:
        self.batch, self.w = batch, w
        new_x = batch.x.new_empty if batch.kept_rows is None else batch.x.new_zeros
        self.grad_x = new_x(batch.x.shape) if needs[0] else None
        new_w = w.new_empty if batch.num_rows else w.new_zeros
        self.grad_w = new_w(w.shape, dtype=sum_dtype) if needs[1] else None
        bias_dtype = torch.promote_types(w.dtype, torch.float32)
        self.grad_b = w.new_zeros(len(w), dtype=bias_dtype) if needs[2] else None
        self.grad_target = batch.target.new_empty(batch.target.shape) if needs[3] else None

    def add(self, start: int, step: int, x: Tensor, grad_z: Any, grad_t: Any) -> None:
        rows = self.batch.index_of(start, step)
        if self.grad_x is not None:
            if self.batch.kept_rows is None and self.grad_x.dtype == self.w.dtype:
                torch.mm(grad_z, self.w, out=self.grad_x[rows])
            else:
                self.grad_x[rows] = torch.mm(grad_z, self.w).to(self.grad_x.dtype)
        if self.grad_w is not None:
            _add_product(self.grad_w, grad_z.t(), x, is_first=start == 0)
        if self.grad_b is not None:
            self.grad_b += grad_z.sum(0, dtype=self.grad_b.dtype)
        if self.grad_target is not None:
            self.grad_target[rows] = grad_t

    def finish(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The gradients in the dtypes and shapes of these tensors."""
        gradients = [self.grad_x, self.grad_w, self.grad_b, self.grad_target]
        del self.w  # Free it before the cast of the linear weight's gradient.
        for k, tensor in enumerate(tensors):
            gradient = gradients[k]
            if gradient is not None and tensor is not None:
                gradients[k] = gradient.to(tensor.dtype).view(tensor.shape)
        return gradients


def has_fast_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmul in this dtype is fast on this device."""
    if device.type != "cpu" or dtype.itemsize >= 4:
        return True
    # Private. If the CPU has no instructions for the dtype, torch multiplies element by element.
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype == torch.bfloat16 and is_supported is not None and is_supported()


def rows_per_chunk(
    num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Rows per chunk, chosen so that chunks are nearly equal."""
    most = CHUNK_BYTES_PER_CLASS // dtype.itemsize
    if device.type == "cpu":
        fitting = MAX_CPU_CHUNK_BYTES // dtype.itemsize // max(num_classes, 1)
        most = min(most, max(fitting, MIN_ROWS))
    return _ceil_div(num_rows, _ceil_div(num_rows, most)) if num_rows else 1


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def plan_chunks(
    num_rows: int, linear_weight: Tensor, dtype: torch.dtype, needs_linear_weight_grad: bool
) -> tuple[int, torch.dtype]:
    """Rows per chunk, and the dtype in which the linear weight's gradient is accumulated.

    A sum in half precision is rounded once per chunk, so it gets at most MAX_HALF_CHUNKS chunks,
    which are larger if there are many rows. If such chunks take more memory than the usual chunks
    plus a sum in float32, the usual chunks and that sum are used.
    """
    num_classes, width = linear_weight.shape
    step = rows_per_chunk(num_rows, num_classes, dtype, linear_weight.device)
    if not needs_linear_weight_grad or linear_weight.dtype != dtype or dtype.itemsize >= 4:
        return step, torch.promote_types(linear_weight.dtype, torch.float32)
    # A sum in half precision has half the traffic, so half the rows suffice to hide it.
    half_precision_step = max(_ceil_div(num_rows, MAX_HALF_CHUNKS), step // 2, 1)
    # In bytes per class. A sum in half precision is the gradient itself, so it is not counted.
    usual_chunk_and_sum = step * dtype.itemsize + width * torch.float32.itemsize
    if half_precision_step * dtype.itemsize <= usual_chunk_and_sum:
        return half_precision_step, dtype
    return step, torch.float32


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += left · right, in the dtype of `total`."""
    if total.dtype == left.dtype:
        if is_first:
            torch.mm(left, right, out=total)
        else:
            torch.addmm(total, left, right, out=total)
        return
    if total.is_cuda and total.dtype == torch.float32:
        if is_first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        return
    for block, left_block in zip(total.split(BLOCK), left.split(BLOCK), strict=True):
        product = torch.mm(left_block, right)
        if is_first:
            block.copy_(product)
        else:
            block.add_(product)


def product_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


# ---- The formula


def formula(
    dtype: torch.dtype,
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss of all logits at once."""
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, linear_weight.shape[0], call.ignore_index)
    logits = _logits(dtype, input, linear_weight, linear_bias, classes)
    return formulas.compute(call, Arguments(logits, target, weight, sample_weight), classes)


def _logits(
    dtype: torch.dtype,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    classes: Classes | None,
) -> Tensor:
    not_ignored = None if classes is None else classes.not_ignored
    # 0 · ∞ of an ignored row would make the linear weight's gradient NaN.
    if not_ignored is not None:
        input = input.where(not_ignored.unsqueeze(-1), 0)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


class FlatSharding(Sharding):
    """The same sharding, for the input with all dimensions of samples flattened into one.

    Used for unreduced losses, whose only collective is `over_classes`.
    """

    def __init__(self, sharding: Sharding) -> None:
        samples = math.prod(sharding.shape[: sharding.dim])
        super().__init__((samples, sharding.num_classes), 1)
        self.sharding = sharding

    def over_classes(self, values: Tensor, operation: str = "sum") -> Tensor:
        return self.sharding.over_classes(values, operation)


def unreduced_losses(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sharding: Sharding,
    classes: Classes | None,
    position: ClassPosition | None,
) -> Tensor:
    """`formulas.unreduced_losses` in chunks of rows, whose logits backward computes again.

    Under torch.compile, where only `sharded` calls this, it computes all rows at once.
    """
    samples = input.shape[:-1]
    dtype = product_dtype(input)
    flat = FlatSharding(sharding)
    call = call._replace(dim=1)
    count = samples.numel()
    x = input.reshape(count, input.shape[-1])
    t = target.reshape(count, *target.shape[len(samples) :])
    step = rows_per_chunk(count, linear_weight.shape[0], dtype, x.device)

    def part(chunk: slice) -> Tensor:
        part_classes, part_position = classes, position
        if classes is not None and position is not None:
            part_classes = classes._replace(target=t[chunk])
            is_here = None if position.is_here is None else position.is_here.reshape(-1)[chunk]
            part_position = ClassPosition(position.indices.reshape(-1, 1)[chunk], 1, is_here)
        logits = _logits(dtype, x[chunk], linear_weight, linear_bias, part_classes)
        arguments = Arguments(logits, t[chunk], weight)
        return formulas.unreduced_losses(call, arguments, flat, part_classes, part_position)

    if torch.compiler.is_compiling() or step >= count:
        return part(slice(None)).view(samples)
    tensors = (input, linear_weight, linear_bias, target, weight)
    versions = _versions(tensors)
    if linear_weight.dtype.itemsize < 4:
        # `part` reads these copies from now on, and `_logits` casts them back for each chunk. So
        # autograd adds the chunks' gradients in float32.
        linear_weight = linear_weight.float()
        linear_bias = None if linear_bias is None else linear_bias.float()

    def unchanged_part(chunk: slice) -> Tensor:
        if _versions(tensors) != versions:  # A checkpoint saves nothing that autograd could check.
            raise RuntimeError(
                "one of the arguments of a loss has been modified by an inplace operation before "
                "its gradient was computed"
            )
        return part(chunk)

    chunks = [slice(start, start + step) for start in range(0, count, step)]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    parts = [checkpoint(unchanged_part, chunk, **options) for chunk in chunks]
    return torch.cat(parts).view(samples)


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    """The version of each tensor. Inference tensors have none."""
    return [t._version for t in tensors if t is not None and not t.is_inference()]


LOSS_OPERATOR = ops.Operator(
    "linear_loss",
    ["Tensor input", "Tensor linear_weight", "Tensor? linear_bias", "Tensor target"],
    ["product_dtype"],
    LayerKernels,
    formula,
)
