"""Loss and gradient in one pass on the GPU, in Triton, which nothing else imports.

A loss is bound by memory, so what counts is how often a byte of a tensor comes from memory or goes
there: each form of the kernel says what it reads (R) and writes (W), with y or x the input and t a
dense target. Nothing here waits for the device: what the host does not know is read by the kernels.

A small loss is bound by launches. Forward and backward are two of them, whatever the reduction:
`_loss_kernel`, and `_rescale_kernel` or, where the gradient waited for the upstream one,
`_loss_kernel` again. A third, `_count_kernel`, computes the divisor of `'mean'` before a pass that
needs gradients, if there are more than COUNT_ALONE samples. Triton's argument processing takes
longer than a small loss, so after the first call a `Launch` calls the compiled binary directly.
Beside the loss and its gradients it allocates nothing.

The input is seen as (outer, classes, inner). A tile has samples × classes elements, in the shape
(per_thread, samples, threads, vector): each thread holds the first and the last dimension. With
inner = 1 samples are contiguous rows, and with classes = 1 too a flat vector. Otherwise samples are
strided along inner, and a block never crosses an outer index. So offsets within a block fit in 32
bits, and only the block's index needs a division.

Programs take blocks of samples in turns. Each adds up its own in a fixed order, and whichever comes
last adds up the partial sums in a fixed order too, so the same input gives the same bits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlosses import checks
from torchlosses.formulas import Call, Result
from torchlosses.kernels.triton.blocks import BODIES, Given, Plan, find_body
from torchlosses.kernels.triton.kernels import (
    COUNT_BLOCK,
    _count_kernel,
    _loss_kernel,
    _rescale_kernel,
)
from torchlosses.kernels.triton.tiles import FEW, MAX_PROGRAMS, configure

COUNT_PROGRAMS = 2**9
# Samples at most that each program counts for itself, which takes less time than another launch.
COUNT_ALONE = 2**12
# Elements of a block of `_rescale_kernel`.
RESCALED = 2**11
# Shapes of gradients at most that a launch keeps a rescaling kernel for.
MOST_RESCALERS = 16
# Launches of captured graphs with a counter of their own; any more clear theirs at each replay.
GRAPH_COUNTERS = 2**14
# The default differs by version, and Triton 3.9 warns of that where nothing is said.
FUSION = {"enable_fp_fusion": True}
CAN_FAIL = True  # A driver, a compiler or a GPU may refuse any kernel.
LOSSES: tuple[str, ...] = tuple(BODIES)
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

Strides = tuple[int, int, int]

_workspaces: dict[tuple[torch.device, torch.dtype], "Workspaces"] = {}
_graph_counters: dict[torch.device, Iterator[Tensor]] = {}


def prepare(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> "Launch":
    """The launches of all calls whose tensors are like these.

    They agree in dtype, shape, strides and device, and in whether 16 divides the address.
    """
    for name, known in ((call.kind, LOSSES), (call.reduction, checks.REDUCTIONS)):
        if name not in known:
            raise ValueError(f"got {name!r}; expected one of {known}, which the kernel knows")
    return Launch(call, input, target, weight, sample_weight)


class Pass:
    """What is known of a forward or a backward pass: all arguments of its kernels but tensors.

    Once Triton has compiled the kernels, `run` and `count` launch them.
    """

    def __init__(
        self,
        plan: Plan,
        programs: int,
        counting: int,
        copies_upstream: bool,
        numbers: tuple[int, ...],
        factors: tuple[float, ...],
        options: dict[str, int],
    ) -> None:
        self.plan, self.programs, self.counting = plan, programs, counting
        self.copies_upstream = copies_upstream
        self.numbers, self.rest, self.options = numbers, (*factors, plan), options
        self.run: Any = None
        self.count: Any = None


class Launch:
    """See `prepare`."""

    def __init__(
        self,
        call: Call,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
    ) -> None:
        self.call, self.device, self.itemsize = call, input.device, input.dtype.itemsize
        self.has_weight = weight is not None
        self.body = find_body(call.kind, call.is_index, call.label_smoothing != 0)
        self.is_reduced = call.reduction != "none"
        self.is_counted = call.reduction == "mean" and (call.is_index or sample_weight is not None)
        shape, dim = input.shape, call.dim
        samples_shape: tuple[int, ...] = shape[:dim] + shape[dim + 1 :]
        self.losses_shape = shape if call.is_per_element else torch.Size(samples_shape)
        self.workspaces = None
        if self.is_reduced:
            self.workspaces = _find_workspaces(input.device, call.dtype)
        divisor = 1
        if call.reduction == "batchmean" and len(shape) > 1:
            divisor = shape[0]
        elif call.reduction == "mean" and not self.is_counted:
            divisor = self.losses_shape.numel()
        self.by_divisor = 1.0 / divisor

        # If no factor depends on the class dimension, the tensor is flat: (numel, 1, 1).
        weights_shape = None if sample_weight is None else sample_weight.shape
        is_flat = self.body == "elements" and not (
            call.is_index or call.label_smoothing != 0 or self.has_weight
        )
        if call.is_per_element and is_flat:
            is_flat = not _is_per_sample(weights_shape, shape, dim)
            samples_shape = shape if is_flat else (*shape[:dim], 1, *shape[dim + 1 :])
        elif is_flat:
            is_flat = self.is_reduced and weights_shape is None
        outer, classes, inner = self.layout = (shape.numel(), 1, 1) if is_flat else (
            shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()
        )  # fmt: skip
        self.weights_layout = samples_shape, (outer, 1, inner)
        self.upstream_layout = (
            self.losses_shape,
            (outer, classes if call.is_per_element else 1, inner),
        )
        self.weight_strides, self.copies_weights = _strides(sample_weight, *self.weights_layout)
        self.copies = self.copies_weights or not (
            input.is_contiguous()
            and target.is_contiguous()
            and (weight is None or weight.is_contiguous())
        )
        # Whether the gradient is aligned where it overwrites the input.
        self.is_aligned = not input.is_contiguous() or input.data_ptr() % 16 == 0
        self._passes: dict[Any, Pass] = {}
        self._rescalers: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def compute(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        needs: tuple[bool, bool],
        upstream: Tensor | None = None,
        over_input: bool = False,
        complains: bool = True,
    ) -> Result:
        """The loss, and the gradients that `needs` asks for, times `upstream` if that is given.

        Labels are not validated on the host: an invalid one gives NaN for its sample. The gradient
        may overwrite a contiguous input: a program stores a tile's gradient after its last read.
        """
        index, stream = self.device.index, None
        if index is not None:
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return self.compute(
                        input, target, weight, sample_weight, needs, upstream, over_input, complains
                    )
            stream = triton.runtime.driver.active.get_current_stream(index)
        if self.copies:
            input, target = input.contiguous(), target.contiguous()
            weight = None if weight is None else weight.contiguous()
            if sample_weight is not None and self.copies_weights:
                sample_weight = _copy(sample_weight, *self.weights_layout)
        kind = needs if upstream is None else (needs, upstream.dtype, upstream.stride())
        known = self._passes.get(kind)
        if known is None:
            known = self._passes[kind] = self._plan(needs, upstream)
        is_usual = self.is_aligned or not over_input
        if upstream is not None:
            if known.copies_upstream:
                upstream = _copy(upstream, *self.upstream_layout)
            is_usual = is_usual and upstream.data_ptr() % 16 == 0
        grad_input = grad_target = sums = counter = None
        if needs[0]:
            grad_input = input if over_input else torch.empty_like(input)
        if needs[1]:
            grad_target = torch.empty_like(target)
        if self.workspaces is None:
            loss = input.new_empty(self.losses_shape, dtype=self.call.dtype)
        else:
            loss = torch.empty_like(self.workspaces.loss)
            sums, counter = self.workspaces.find(stream)
        given = (
            input, target, weight, sample_weight, upstream, loss, grad_input, grad_target,
            *known.numbers,
        )  # fmt: skip
        if known.run is not None and is_usual:
            if known.count is not None:
                known.count(given, sums, counter, known.plan, stream=stream)
            known.run(given, sums, counter, *known.rest, stream=stream)
        else:
            common, count = (Given(*given), sums, counter), None
            if known.counting:
                count = _launch(_count_kernel, known.counting, (*common, known.plan))
            arguments = (*common, *known.rest)
            run = _launch(_loss_kernel, known.programs, arguments, **known.options)
            if is_usual:
                known.count, known.run = count, run
        return loss, grad_input, grad_target

    def rescale(
        self, gradients: Sequence[Tensor | None], grad_loss: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        """Gradients times that of their loss, in place, as tensors of their own; None for none.

        Of the first, the rows stay 0 that the target ignores.
        """
        index, stream = self.device.index, None
        if index is not None:
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return self.rescale(gradients, grad_loss, target)
            stream = triton.runtime.driver.active.get_current_stream(index)
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        labels = target.contiguous() if self.call.is_index else None
        rescaled: list[Tensor | None] = []
        for gradient in gradients:
            if gradient is not None:
                gradient = gradient.data
                self._rescale(gradient, grad_loss, labels, stream)
            rescaled.append(gradient)
            labels = None
        return rescaled

    def _rescale(
        self, gradient: Tensor, grad_loss: Tensor, labels: Tensor | None, stream: int | None
    ) -> None:
        kind = (gradient.shape, gradient.dtype, grad_loss.dtype, labels is None)
        run, numbers = self._rescalers.get(kind, (None, ()))
        places = gradient.data_ptr() | grad_loss.data_ptr()
        if labels is not None:
            places |= labels.data_ptr()
        is_usual = places % 16 == 0
        if run is not None and is_usual:
            run(gradient, grad_loss, labels, *numbers, stream=stream)
            return
        numel = gradient.numel()
        numbers = (numel, 1, 1, 1, RESCALED)
        if labels is not None:
            sizes = gradient.shape[self.call.dim :]
            numbers = (numel, self.call.ignore_index, sizes.numel(), sizes[1:].numel(), RESCALED)
        programs = min(triton.cdiv(numel, RESCALED), MAX_PROGRAMS)
        run = _launch(_rescale_kernel, programs, (gradient, grad_loss, labels, *numbers))
        if is_usual and len(self._rescalers) < MOST_RESCALERS:
            self._rescalers[kind] = run, numbers

    def _plan(self, needs: tuple[bool, bool], upstream: Tensor | None) -> Pass:
        call, dtype = self.call, self.call.dtype
        outer, classes, inner = self.layout
        is_smooth, is_exact = call.label_smoothing != 0, call.delta == 0
        tile = configure(
            self.body, classes, inner, dtype, self.itemsize, call.is_index, is_exact,
            not (needs[1] or is_smooth or self.has_weight),
        )  # fmt: skip
        is_spatial = inner > 1
        blocks = triton.cdiv(outer, tile.samples)
        if is_spatial:
            blocks = outer * triton.cdiv(inner, tile.samples)
        divisor, counting = "host", 0
        if self.is_counted:
            divisor = "each_program" if any(needs) else "last_program"
            if any(needs) and outer * inner > COUNT_ALONE:
                divisor = "count_kernel"
                counting = min(triton.cdiv(outer * inner, COUNT_BLOCK.value), COUNT_PROGRAMS)
        alignment = math.gcd(tile.alignment, inner if is_spatial else classes)
        strides, copies_upstream = _strides(upstream, *self.upstream_layout)
        weight_outer_stride, _, weight_inner_stride = self.weight_strides
        _, class_stride, inner_stride = strides
        reach = max(
            classes * inner, classes * class_stride, inner * inner_stride,
            inner * weight_inner_stride,
        )  # fmt: skip
        plan = Plan(
            LOSS=call.kind,
            DTYPE=DTYPES[dtype],
            TILE=tile,
            INDEX=tl.int32 if reach < 2**31 - 2**16 else tl.int64,
            ALIGNMENT=alignment,
            DIVISOR=divisor,
            PER_ELEMENT=call.is_per_element,
            IS_INDEX=call.is_index,
            IS_EXACT=is_exact,
            IS_SMOOTH=is_smooth,
            IS_REDUCED=self.is_reduced,
            IS_SPATIAL=is_spatial,
            IS_EVEN=classes % tile.classes == 0,
            NUM_CLASSES=classes if classes <= FEW else 0,
        )
        # One size is divided by ALIGNMENT and multiplied back in the kernel, so Triton can prove
        # divisibility and vectorise. An odd argument keeps it from inferring more than ALIGNMENT.
        sizes = (outer, classes // alignment, inner)
        if is_spatial:
            sizes = (outer, classes, inner // alignment * 2 + 1)
        smoothing = call.label_smoothing
        return Pass(
            plan, min(blocks, tile.programs), counting, copies_upstream,
            (*sizes, weight_outer_stride, weight_inner_stride, *strides, call.ignore_index),
            (self.by_divisor, call.delta, 1.0 - smoothing, smoothing / classes),
            {"num_warps": tile.warps, "maxnreg": tile.registers},
        )  # fmt: skip


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: int) -> Any:
    """Launches a kernel, and gives what does that again for arguments of these types and places."""
    binary = kernel[(programs,)](*arguments, **options, **FUSION)
    return None if binary is None else binary[(programs, 1, 1)]  # The interpreter returns None.


def _is_per_sample(weights_shape: torch.Size | None, shape: torch.Size, dim: int) -> bool:
    """Whether weights that broadcast to elements are the same for all classes, and not for all."""
    if weights_shape is None or weights_shape.numel() == 1:
        return False
    dim -= len(shape)
    return -dim > len(weights_shape) or weights_shape[dim] == 1


def _strides(
    factor: Tensor | None, shape: Sequence[int], layout: tuple[int, int, int]
) -> tuple[Strides, bool]:
    """Those of what broadcasts to `shape`, seen as `layout`; and whether that takes a copy."""
    if factor is None or factor.numel() == 1:
        return (0, 0, 0), False
    seen = _copy(factor, shape, layout)
    outer_stride, class_stride, inner_stride = seen.stride()
    return (outer_stride, class_stride, inner_stride), seen.data_ptr() != factor.data_ptr()


def _copy(factor: Tensor, shape: Sequence[int], layout: tuple[int, int, int]) -> Tensor:
    return factor.expand(shape).reshape(layout)


class Workspaces:
    """Where the programs of a launch store their sums, and a counter, which is 0 between launches.

    Launches of one stream run one after the other, and share them. Those of a captured graph may
    run beside any: their sums are in the graph's memory, and nobody else has their counter.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.loss = torch.empty((), dtype=dtype, device=device)  # What all sums are like.
        self.by_stream: dict[int | None, tuple[Tensor, Tensor]] = {}

    def find(self, stream: int | None) -> tuple[Tensor, Tensor]:
        if stream is not None and torch.cuda.is_current_stream_capturing():
            counter = next(_graph_counters.get(self.device, iter(())), None)
            return self._make(counter)
        workspace = self.by_stream.get(stream)
        if workspace is None:
            workspace = self.by_stream[stream] = self._make()
            if stream is not None and self.device not in _graph_counters:
                # Each at a multiple of 16 bytes.
                size = (GRAPH_COUNTERS, 4)
                counters = torch.zeros(size, dtype=torch.int32, device=self.device)
                torch.cuda.synchronize(self.device)  # For the streams that graphs run on.
                _graph_counters[self.device] = map(counters.__getitem__, range(GRAPH_COUNTERS))
        return workspace

    def _make(self, counter: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if counter is None:
            counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        return self.loss.new_empty(3 * MAX_PROGRAMS), counter


def _find_workspaces(device: torch.device, dtype: torch.dtype) -> Workspaces:
    if (device, dtype) not in _workspaces:
        _workspaces[device, dtype] = Workspaces(device, dtype)
    return _workspaces[device, dtype]
