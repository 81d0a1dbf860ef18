"""The cross-entropy of a linear layer's logits, which are never there at once.

Rows are taken in chunks: the logits of one are made in a buffer that is used again, a kernel turns
them into their gradient where they stand, and three products take it on to input, weight and bias.
Where no kernel serves, the formula does, and in eager autograd a chunk at a time too, whose logits
are made again in backward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils.checkpoint import checkpoint

from torchlosses import checks, formulas, fused
from torchlosses.formulas import Call, Classes, Place, Rows

# Bytes that each class has in the logits of a chunk, of 1024 rows in float32 and 2048 in half
# precision. On a GPU the products of 1024 rows by 32000 classes are 2000 tiles of 128 by 128, for
# some 130 processors. The weight's gradient is read and written in float32 for each chunk, 8 bytes
# of it for 2 operations a row: those of 2048 rows are 512 for each byte, where a GPU does some 300
# in half precision in the time that a byte takes.
CHUNK = 2**12
# On a CPU a chunk's logits should fit in so many bytes. With more classes it has fewer rows, which
# takes a few percent longer, but no fewer than LEAST_ROWS: half as many take 10 to 15 % longer.
CHUNK_ON_CPU = 48 * 10**6
LEAST_ROWS = 256
# Classes at a time in the weight's gradient, where products in half precision are added to float32:
# a product of so many is still in the cache when it is added.
BLOCK = 4096


# As it is before another library replaces it.
LINEAR_FORWARD = nn.Linear.forward
# Private, as are the hooks of one module: torch has no public way to ask for them.
has_global_hook: Callable[[], int] = getattr(module, "_has_any_global_hook", checks.unknown)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is F.linear by its weight and bias, and nothing else."""
    return (
        getattr(type(layer), "forward", None) is LINEAR_FORWARD  # A scripted layer's has none.
        and type(layer).__call__ is nn.Module.__call__  # Of now: torch.fx sets another.
        and "forward" not in vars(layer)  # As accelerate's offloading sets it.
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
    """The loss of the logits of a linear layer, in chunks of rows wherever that can be."""
    dtype = product_dtype(input)
    arguments = (input, linear_weight, linear_bias, target, weight, sample_weight)
    if (
        torch.compiler.is_compiling()
        and fused.serves_graph(call, input, target, weight, sample_weight, *arguments[1:3])
        and 0 not in linear_weight.shape
    ):
        return LINEAR_LOSS(call, (dtype,), *arguments)
    present = [argument for argument in arguments if argument is not None]
    if not all(type(argument) in checks.PLAIN for argument in present):
        return formula(dtype, call, *arguments)
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, linear_weight.shape[0], call.ignore_index)
    kernels = fused.find_kernels(call, input, target, weight, sample_weight)
    if kernels is not None and linear_weight.dtype in fused.DTYPES and linear_weight.numel() > 0:
        learns = torch.is_grad_enabled() and any(argument.requires_grad for argument in present)
        dtypes = [argument.dtype for argument in arguments[:4] if argument is not None]
        waits = fused.waits_for_upstream(call, dtype, *dtypes)
        whole = functools.partial(formula, dtype)
        loss = fused.attempt((Chunks(kernels, dtype), call, whole, waits), learns, *arguments)
        if loss is not None:
            return loss
    if not checks.is_eager():
        return formula(dtype, call, *arguments)
    rows = Rows(linear_weight.shape[0], call.dim)
    place = None if classes is None else rows.find(classes)
    losses = losses_of(
        call, input, linear_weight, linear_bias, target, weight, rows, classes, place
    )
    shape = input.shape[:-1] + linear_weight.shape[:1]
    return formulas.reduced(call, losses, shape, weight, sample_weight, classes)


class Chunks(NamedTuple):
    """The kernels for a chunk of logits, as kernels for the linear layer that puts them out."""

    kernels: fused.Kernels
    dtype: torch.dtype  # Of the products.

    def rescale(
        self, gradients: Sequence[Tensor | None], grad_loss: Tensor, call: Call, target: Tensor
    ) -> Sequence[Tensor | None] | None:
        return self.kernels.rescale(gradients, grad_loss, call, target)

    def compute(self, call: Call, input: Tensor, *rest: Any) -> list[Any]:
        """The loss, and the gradients by input, weight, bias and target, times that of upstream."""
        with torch.autocast(input.device.type, enabled=False):  # All dtypes are chosen here.
            return self._compute(call, input, *rest)

    def _compute(
        self,
        call: Call,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        needs: Sequence[bool],
        upstream: Tensor | None = None,
    ) -> list[Any]:
        num_classes, width = linear_weight.shape
        samples = input.shape[:-1]
        like = input.new_empty((), dtype=call.dtype)
        x = input.reshape(samples.numel(), width)
        t = target.reshape(len(x), *target.shape[len(samples) :])
        s = None if sample_weight is None else sample_weight.expand(samples).reshape(-1)
        classes = kept = places = None
        if call.is_index:
            classes = Classes(target, num_classes, call.ignore_index)
            kept = (formulas.long(t, call.ignore_index) != call.ignore_index).unsqueeze(1)
            if checks.can_look(t):
                if kept.all():
                    kept = None
                else:
                    places = kept.nonzero()[:, 0]
        shape = samples + linear_weight.shape[:1]
        divisor = formulas.find_divisor(call, like, shape, weight, sample_weight, classes)
        if s is not None and sample_weight is not None and call.reduction == "mean":
            s, divisor = formulas.lifted(s.to(like.dtype), divisor)
        if divisor is not None:  # Of the whole, so it is no business of the chunks.
            upstream = (like.new_ones(()) if upstream is None else upstream) / divisor
        is_none = call.reduction == "none"
        chunk_call = call._replace(dim=1, reduction="none" if is_none else "sum")
        u = upstream.reshape(-1) if is_none and upstream is not None else None

        dtype = self.dtype if _has_products(x.device, self.dtype) else torch.float32
        sums = torch.float32 if dtype.itemsize < 4 else dtype
        w = linear_weight.to(dtype)
        b = None if linear_bias is None else linear_bias.to(dtype)
        count = len(x) if places is None else len(places)
        step = find_step(count, num_classes, dtype, x.device)
        logits = x.new_empty((step, num_classes), dtype=dtype)
        losses: Any = like.new_zeros(samples) if is_none else []
        grad_x = grad_w = grad_b = grad_t = None
        if needs[0]:  # Zeros where rows are left out.
            grad_x = x.new_empty(x.shape) if places is None else x.new_zeros(x.shape)
        if needs[1]:
            grad_w = w.new_empty(w.shape, dtype=sums)
        if needs[2]:
            grad_b = w.new_zeros(num_classes, dtype=sums)
        if needs[3]:
            grad_t = t.new_empty(t.shape)
        z = grad_z = logits
        for start in range(0, count, step):
            chunk: Any = slice(start, min(start + step, count))
            if places is not None:
                chunk = places[chunk]
            x_part = x[chunk].to(dtype)
            if kept is not None and places is None:  # 0 times an infinity that is ignored is NaN.
                x_part = x_part.where(kept[chunk], 0)
            z = logits[: len(x_part)]
            if b is None:
                torch.mm(x_part, w.t(), out=z)
            else:
                torch.addmm(b, x_part, w.t(), out=z)
            over_input, complains = True, False  # Of a class; but for a graph they are seen before.
            loss, grad_z, grad_t_part = self.kernels.compute(
                chunk_call, z, t[chunk], weight, None if s is None else s[chunk],
                (any(needs[:3]), needs[3]), upstream if u is None else u[chunk],
                over_input, complains,
            )  # fmt: skip
            if is_none:
                losses.view(-1)[chunk] = loss
            else:
                losses.append(loss)
            if grad_x is not None:
                if places is None and grad_x.dtype == dtype:
                    torch.mm(grad_z, w, out=grad_x[chunk])
                else:
                    grad_x[chunk] = torch.mm(grad_z, w).to(grad_x.dtype)
            if grad_w is not None:
                _add_product(grad_w, grad_z.t(), x_part, is_first=start == 0)
            if grad_b is not None:
                grad_b += grad_z.sum(0, dtype=sums)
            if grad_t is not None:
                grad_t[chunk] = grad_t_part
        del logits, w, z, grad_z  # Before there is another gradient by the weight.
        if grad_w is not None and count == 0:
            grad_w.zero_()
        if is_none:
            loss = losses
        else:
            loss = torch.stack(losses).sum() if losses else like.new_zeros(())
            loss = loss if divisor is None else loss / divisor
        results = [loss]
        layer = (input, linear_weight, linear_bias, target)
        for gradient, argument in zip((grad_x, grad_w, grad_b, grad_t), layer, strict=True):
            if gradient is not None and argument is not None:
                gradient = gradient.to(argument.dtype).view(argument.shape)
            results.append(gradient)
        return results


def _has_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in a dtype are not slower than in float32 by far."""
    if device.type != "cpu" or dtype.itemsize >= 4:
        return True
    # Private; without vector instructions for it torch multiplies one element at a time.
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype == torch.bfloat16 and is_supported is not None and is_supported()


def find_step(rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """The rows of a chunk: all chunks but the last have as many, and that not many fewer."""
    most = CHUNK // dtype.itemsize
    if device.type == "cpu":
        fitting = CHUNK_ON_CPU // dtype.itemsize // max(num_classes, 1)
        most = min(most, max(fitting, LEAST_ROWS))
    return -(-rows // -(-rows // most)) if rows else 1


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += left · right, in the dtype of the total."""
    if total.dtype == left.dtype:
        if is_first:
            torch.mm(left, right, out=total)
        else:
            torch.addmm(total, left, right, out=total)
        return
    for block, rows in zip(total.split(BLOCK), left.split(BLOCK), strict=True):
        product = torch.mm(rows, right)
        if is_first:
            block.copy_(product)
        else:
            block.add_(product)


def product_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the products, as F.linear has it."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


# ---- By the formula


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
    """The loss by all logits at once."""
    classes = None
    if call.is_index:
        classes = checks.check_classes(target, linear_weight.shape[0], call.ignore_index)
    logits = _logits(dtype, input, linear_weight, linear_bias, classes)
    return formulas.compute(call, logits, target, weight, sample_weight, classes)


def _logits(
    dtype: torch.dtype,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    classes: Classes | None,
) -> Tensor:
    kept = None if classes is None else classes.kept
    if kept is not None:  # The weight's gradient is NaN by 0 times an infinity that is ignored.
        input = input.where(kept.unsqueeze(-1), 0)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def losses_of(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    rows: Rows,
    classes: Classes | None,
    place: Place | None,
) -> Tensor:
    """`formulas.losses_of` logits, in chunks of rows whose logits backward makes again."""
    samples = input.shape[:-1]
    dtype = product_dtype(input)
    flat = Rows(rows.num_classes, 1)
    flat.over_classes = rows.over_classes  # type: ignore[method-assign]
    call = call._replace(dim=1)
    count = samples.numel()
    x = input.reshape(count, input.shape[-1])
    t = target.reshape(count, *target.shape[len(samples) :])
    step = find_step(count, linear_weight.shape[0], dtype, x.device)

    def part(chunk: slice) -> Tensor:
        of, at = classes, place
        if of is not None and at is not None:
            of = of._replace(target=t[chunk])
            is_here = None if at.is_here is None else at.is_here.reshape(-1)[chunk]
            at = Place(at.position.reshape(-1, 1)[chunk], 1, is_here)
        logits = _logits(dtype, x[chunk], linear_weight, linear_bias, of)
        return formulas.losses_of(call, logits, t[chunk], weight, flat, of, at)

    if torch.compiler.is_compiling() or step >= count:
        return part(slice(None)).view(samples)
    tensors = (input, linear_weight, linear_bias, target, weight)
    versions = _versions(tensors)
    if linear_weight.dtype.itemsize < 4:  # So that autograd adds up their gradients in float32.
        linear_weight = linear_weight.float()
        linear_bias = None if linear_bias is None else linear_bias.float()

    def unchanged_part(chunk: slice) -> Tensor:
        if _versions(tensors) != versions:  # Autograd does not look: a checkpoint saves nothing.
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
    """How often each tensor has been written to; those of inference mode do not count it."""
    return [t._version for t in tensors if t is not None and not t.is_inference()]


LINEAR_LOSS = fused.Operator(
    "linear_loss",
    ["Tensor input", "Tensor linear_weight", "Tensor? linear_bias", "Tensor target"],
    ["ScalarType product_dtype"],
    lambda kernels, dtype: Chunks(kernels, dtype).compute,
    lambda dtype: functools.partial(formula, dtype),
)
