"""Loss and gradients in one pass on the GPU, by Triton kernels.

A loss is bound by memory, so the kernels read and write each byte as few times as possible; each
says what it reads (R) and writes (W). After the first call per device, nothing here synchronises
with it: what the host does not know, such as the number of ignored samples, the kernels compute.

The loss of a small input is bound by launches. Forward launches `_loss_kernel`. Backward launches
`_rescale_kernel` for each gradient that forward has computed, or else `_loss_kernel` again. Only if
the divisor of `'mean'` is a sum of weights of more than LOCAL_DIVISOR_SAMPLES samples does a pass
with gradients launch `_divisor_kernel` first. Triton's argument processing takes longer than the
kernel of a small input, so from the second call on, a `Plan` bypasses Triton and calls the compiled
binary directly. It then allocates nothing but the loss and its gradients, except in captured graphs
and where a tensor must be copied to be contiguous or broadcast.

The input is seen as (outer, classes, inner). If inner = 1, each sample is a contiguous row, or one
element of a flat tensor, where classes = 1. If inner > 1, neighbouring samples are adjacent in
memory, classes are strided, and a block of samples has one outer index. So offsets within a block
almost always fit in 32 bits (otherwise INDEX is int64), and finding the outer index takes one
division per block, not one per sample.

A program computes a block of samples in tiles of classes. A tile has the shape (vectors, samples,
row_threads, vector_size), whose first, third and last dimension together are the classes:

- If inner = 1, `row_threads` threads share a sample. Each holds `vectors` vectors of `vector_size`
  neighbouring classes in its registers.
- If inner > 1, the third and the last dimension have size 1, and all classes of the tile are along
  the first. Neighbouring threads hold neighbouring samples. Triton keeps the first dimension in one
  thread if the classes are few, and distributes it over several if not.

Each program takes every `num_programs`-th block of samples and adds up its losses in a fixed order.
The last program to finish adds up the partial sums in a fixed order too, so the same input gives
the same bits.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like
from triton.runtime import driver

from torchlosses import checks
from torchlosses.formulas import Call, Result
from torchlosses.kernels.triton.blocks import Constants, KernelArgs
from torchlosses.kernels.triton.kernels import (
    DIVISOR_BLOCK,
    _divisor_kernel,
    _loss_kernel,
    _rescale_kernel,
)
from torchlosses.kernels.triton.losses import BODIES, find_body
from torchlosses.kernels.triton.tiles import MAX_CONSTANT_CLASSES, MAX_PROGRAMS, configure

MAX_DIVISOR_PROGRAMS = 2**9
# For up to this many samples each program of `_loss_kernel` computes the divisor of `'mean'`
# itself, which takes less time than another launch.
LOCAL_DIVISOR_SAMPLES = 2**12
# Offsets within a block are int32 if one sample, or one outer index if inner > 1, extends over
# fewer elements than this in every tensor. A block of several samples extends further, but by less
# than 2¹⁶ elements.
MAX_INT32_EXTENT = 2**31 - 2**16
# Elements per block of `_rescale_kernel`.
RESCALE_BLOCK = 2**11
# The most compiled `_rescale_kernel`s that a `Plan` keeps.
MAX_RESCALERS = 16
# How many launches in captured graphs get a counter zeroed in advance. The counter of any further
# launch is zeroed at each replay.
GRAPH_COUNTERS = 2**14
# The default differs by version, and Triton 3.9 warns if it is not set.
FUSION = {"enable_fp_fusion": True}
CAN_FAIL = True  # A driver, compiler or GPU may refuse any kernel.
LOSSES: tuple[str, ...] = tuple(BODIES)
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

Shape3D = tuple[int, int, int]
Strides = tuple[int, int, int]

_workspaces: dict[tuple[torch.device, torch.dtype], "Workspaces"] = {}
_graph_counters: dict[torch.device, Iterator[Tensor]] = {}  # Those that no graph has yet.


def prepare(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> "Plan":
    """A plan for calls whose tensors have the dtypes, shapes, strides and device of these.

    Their addresses must also agree in whether 16 divides them.
    """
    for name, known in ((call.kind, LOSSES), (call.reduction, checks.REDUCTIONS)):
        if name not in known:
            raise ValueError(f"got {name!r}; expected one of {known}")
    return Plan(call, input, target, weight, sample_weight)


@dataclasses.dataclass
class Pass:
    """A forward or backward pass: its kernels' numbers of programs, and all arguments but tensors.

    `run_loss` and `run_divisor` launch the compiled kernels; they are None before the first call.
    """

    constants: Constants
    num_programs: int
    num_divisor_programs: int  # 0 if there is no `_divisor_kernel`.
    copies_upstream: bool
    sizes: tuple[int, ...]  # The fields of `KernelArgs` after the pointers.
    scalars: tuple[float, ...]  # The float arguments of `_loss_kernel`.
    options: dict[str, int]
    run_loss: Any = None
    run_divisor: Any = None

    def launch(
        self, args: tuple[Any, ...], partials: Tensor | None, counter: Tensor | None, keep: bool
    ) -> None:
        """Launches the kernels through Triton, which compiles them. `keep` keeps the binaries."""
        common = (KernelArgs(*args), partials, counter)
        run_divisor = None
        if self.num_divisor_programs:
            run_divisor = _launch(
                _divisor_kernel, self.num_divisor_programs, (*common, self.constants)
            )
        run_loss = _launch(
            _loss_kernel, self.num_programs, (*common, *self.scalars, self.constants),
            **self.options,
        )  # fmt: skip
        if keep:
            self.run_divisor, self.run_loss = run_divisor, run_loss


class Plan:
    """The kernels of calls with the same layout; see `prepare`."""

    def __init__(
        self,
        call: Call,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
    ) -> None:
        self.call, self.itemsize = call, input.dtype.itemsize
        self.device_index = input.device.index  # None on the CPU, in Triton's interpreter.
        self.has_class_weight = weight is not None
        self.body = find_body(call.kind, call.is_index, call.label_smoothing != 0)
        self.is_reduced = call.reduction != "none"
        # Whether the divisor is a sum over samples, which the kernels compute.
        self.sums_divisor = call.reduction == "mean" and (
            call.is_index or sample_weight is not None
        )
        shape, dim = input.shape, call.dim
        losses_shape = shape if call.is_per_element else shape[:dim] + shape[dim + 1 :]
        self.workspaces = _find_workspaces(input.device, call.dtype)
        # A template without memory: `empty_like` takes half the time of `new_empty`.
        self.like_loss = self.workspaces.scalar.expand(() if self.is_reduced else losses_shape)
        divisor = 1
        if call.reduction == "batchmean" and len(shape) > 1:
            divisor = shape[0]
        elif call.reduction == "mean" and not self.sums_divisor:
            divisor = losses_shape.numel()
        self.inv_divisor = 1.0 / divisor

        self.shape_3d, samples_shape = self._find_shape_3d(shape, sample_weight)
        outer, classes, inner = self.shape_3d
        # The shapes that `_reshape` expands and then reshapes a tensor to.
        self.sample_weight_shapes = samples_shape, (outer, 1, inner)
        self.upstream_shapes = losses_shape, (outer, classes if call.is_per_element else 1, inner)
        self.sample_weight_strides, self.copies_sample_weight = _strides(
            sample_weight, *self.sample_weight_shapes
        )
        self.copies_tensors = self.copies_sample_weight or not (
            input.is_contiguous()
            and target.is_contiguous()
            and (weight is None or weight.is_contiguous())
        )
        # The binary that a `Pass` keeps is for a gradient at an aligned address, as new memory is.
        # With `in_place` the gradient has the memory of the input, or of its contiguous copy. If
        # that is not aligned, Triton launches the kernel by another binary, which is not kept.
        self.is_gradient_aligned_in_place = not input.is_contiguous() or input.data_ptr() % 16 == 0
        self._passes: dict[Any, Pass] = {}
        self._rescalers: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def _find_shape_3d(
        self, shape: torch.Size, sample_weight: Tensor | None
    ) -> tuple[Shape3D, Sequence[int]]:
        """(outer, classes, inner) of the input, and the shape that sample weights broadcast to.

        The input is flat, (numel, 1, 1), if nothing depends on which elements form a sample.
        """
        call, dim = self.call, self.call.dim
        # A slice, as the input may have no dimension.
        shape_3d = shape[:dim].numel(), shape[dim : dim + 1].numel(), shape[dim + 1 :].numel()
        flat = shape.numel(), 1, 1
        samples_shape = shape[:dim] + shape[dim + 1 :]
        depends_on_class = call.is_index or call.label_smoothing != 0 or self.has_class_weight
        if self.body != "elementwise" or depends_on_class:
            return shape_3d, samples_shape
        if call.is_per_element:
            if _is_per_sample(sample_weight, shape, dim):
                return shape_3d, (*shape[:dim], 1, *shape[dim + 1 :])
            return flat, shape
        if self.is_reduced and sample_weight is None:
            return flat, samples_shape
        return shape_3d, samples_shape

    def compute(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        needs: tuple[bool, bool],
        upstream: Tensor | None = None,
        in_place: bool = False,
        raise_on_invalid: bool = True,  # For the CPU kernels' signature; unused.
    ) -> Result:
        """The loss, and the gradients that `needs` asks for, times `upstream` if given.

        The host never reads labels, so an invalid one raises nothing: its sample is NaN. With
        `in_place` the gradient overwrites a contiguous input, each tile after its last read.
        """
        index, stream = self.device_index, None
        if index is not None:
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return self.compute(
                        input, target, weight, sample_weight, needs, upstream, in_place
                    )
            stream = driver.active.get_current_stream(index)
        if self.copies_tensors:
            input, target = input.contiguous(), target.contiguous()
            weight = None if weight is None else weight.contiguous()
            if sample_weight is not None and self.copies_sample_weight:
                sample_weight = _reshape(sample_weight, *self.sample_weight_shapes)
        key = needs if upstream is None else (needs, upstream.dtype, upstream.stride())
        pass_ = self._passes.get(key)
        if pass_ is None:
            pass_ = self._passes[key] = self._make_pass(needs, upstream)
        is_aligned = self.is_gradient_aligned_in_place or not in_place
        if upstream is not None:
            if pass_.copies_upstream:
                upstream = _reshape(upstream, *self.upstream_shapes)
            is_aligned = is_aligned and upstream.data_ptr() % 16 == 0
        grad_input = grad_target = partials = counter = None
        if needs[0]:
            grad_input = input if in_place else empty_like(input)
        if needs[1]:
            grad_target = empty_like(target)
        loss = empty_like(self.like_loss)
        if self.is_reduced:
            partials, counter = self.workspaces.find(stream)
        args = (
            input, target, weight, sample_weight, upstream, loss, grad_input, grad_target,
            *pass_.sizes,
        )  # fmt: skip
        if pass_.run_loss is None or not is_aligned:
            pass_.launch(args, partials, counter, keep=is_aligned)
        else:  # A binary takes the fields of `KernelArgs` by position, not by name.
            if pass_.run_divisor is not None:
                pass_.run_divisor(args, partials, counter, pass_.constants, stream=stream)
            pass_.run_loss(args, partials, counter, *pass_.scalars, pass_.constants, stream=stream)
        return loss, grad_input, grad_target

    def rescale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        """Scales gradients in place by the upstream gradient, through `.data`, which it returns.

        In the input's gradient, ignored rows stay 0 though 0 · ∞ is NaN.
        """
        index, stream = self.device_index, None
        if index is not None:
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return self.rescale(gradients, upstream, target)
            stream = driver.active.get_current_stream(index)
        labels = target.contiguous() if self.call.is_index else None
        rescaled: list[Tensor | None] = []
        for gradient in gradients:
            if gradient is not None:
                gradient = gradient.data
                self._rescale(gradient, upstream, labels, stream)
            rescaled.append(gradient)
            labels = None  # Only the input's gradient, the first, has rows of ignored samples.
        return rescaled

    def _rescale(
        self, gradient: Tensor, upstream: Tensor, labels: Tensor | None, stream: int | None
    ) -> None:
        key = (gradient.shape, gradient.dtype, upstream.dtype, labels is None)
        run, sizes = self._rescalers.get(key, (None, ()))
        addresses = gradient.data_ptr() | upstream.data_ptr()
        if labels is not None:
            addresses |= labels.data_ptr()
        is_aligned = addresses % 16 == 0
        if run is not None and is_aligned:
            run(gradient, upstream, labels, *sizes, stream=stream)
            return
        numel = gradient.numel()
        ignore_index = outer_stride = inner = 1  # Unused without labels.
        if labels is not None:
            ignore_index, dim = self.call.ignore_index, self.call.dim
            outer_stride, inner = gradient.shape[dim:].numel(), gradient.shape[dim + 1 :].numel()
        sizes = numel, ignore_index, outer_stride, inner, RESCALE_BLOCK
        num_programs = min(triton.cdiv(numel, RESCALE_BLOCK), MAX_PROGRAMS)
        run = _launch(_rescale_kernel, num_programs, (gradient, upstream, labels, *sizes))
        if is_aligned and len(self._rescalers) < MAX_RESCALERS:
            self._rescalers[key] = run, sizes

    def _make_pass(self, needs: tuple[bool, bool], upstream: Tensor | None) -> Pass:
        call, dtype = self.call, self.call.dtype
        outer, classes, inner = self.shape_3d
        epsilon, has_delta, is_spatial = call.label_smoothing, call.delta != 0, inner > 1
        tile = configure(
            self.body, classes, inner, dtype, self.itemsize,
            has_delta=has_delta,
            is_plain=not (needs[1] or epsilon or self.has_class_weight),
        )  # fmt: skip
        num_blocks = triton.cdiv(outer, tile.samples)
        if is_spatial:
            num_blocks = outer * triton.cdiv(inner, tile.samples)
        divisor_source, num_divisor_programs = self._find_divisor_source(any(needs))
        # Triton vectorises if it can prove that ALIGNMENT divides the offsets. So `classes`, or
        # `inner` if spatial, is divided by ALIGNMENT here and multiplied by it in the kernel. In a
        # row, `vector_size` limits the length of a vector load too.
        alignment = math.gcd(tile.max_alignment, inner if is_spatial else classes)
        encoded_shape = (outer, classes // alignment, inner)
        if is_spatial:
            # If spatial, `vector_size` is 1, so ALIGNMENT alone limits the length of a vector load.
            # But Triton specialises on arguments that 16 divides, and might load longer vectors
            # than `tile.max_alignment` allows, for the reason given in `configure`. So q = inner /
            # ALIGNMENT is passed as 2q + 1, which is odd; `_inner_size` undoes this.
            encoded_shape = (outer, classes, inner // alignment * 2 + 1)
        upstream_strides, copies_upstream = _strides(upstream, *self.upstream_shapes)
        sample_weight_outer_stride, _, sample_weight_inner_stride = self.sample_weight_strides
        _, upstream_class_stride, upstream_inner_stride = upstream_strides
        extent = max(
            classes * inner, classes * upstream_class_stride, inner * upstream_inner_stride,
            inner * sample_weight_inner_stride,
        )  # fmt: skip
        constants = Constants(
            LOSS=call.kind,
            BODY=self.body,
            DTYPE=DTYPES[dtype],
            TILE=tile,
            INDEX=tl.int32 if extent < MAX_INT32_EXTENT else tl.int64,
            ALIGNMENT=alignment,
            DIVISOR_SOURCE=divisor_source,
            PER_ELEMENT=call.is_per_element,
            IS_INDEX=call.is_index,
            HAS_DELTA=has_delta,
            IS_SMOOTHED=epsilon != 0,
            IS_REDUCED=self.is_reduced,
            IS_SPATIAL=is_spatial,
            IS_EVEN=classes % tile.classes == 0,
            NUM_CLASSES=classes if classes <= MAX_CONSTANT_CLASSES else 0,
        )
        return Pass(
            constants=constants,
            num_programs=min(num_blocks, tile.max_programs),
            num_divisor_programs=num_divisor_programs,
            copies_upstream=copies_upstream,
            sizes=(
                *encoded_shape, sample_weight_outer_stride, sample_weight_inner_stride,
                *upstream_strides, call.ignore_index,
            ),
            scalars=(self.inv_divisor, call.delta, 1.0 - epsilon, epsilon / classes),
            options={"num_warps": tile.warps, "maxnreg": tile.registers},
        )  # fmt: skip

    def _find_divisor_source(self, needs_gradients: bool) -> tuple[str, int]:
        """`Constants.DIVISOR_SOURCE`, and the number of programs of `_divisor_kernel`."""
        outer, _, inner = self.shape_3d
        if not self.sums_divisor:
            return "host", 0
        if not needs_gradients:
            return "last_program", 0
        if outer * inner <= LOCAL_DIVISOR_SAMPLES:
            return "each_program", 0
        num_blocks = triton.cdiv(outer * inner, DIVISOR_BLOCK.value)
        return "divisor_kernel", min(num_blocks, MAX_DIVISOR_PROGRAMS)


def _launch(kernel: Any, num_programs: int, arguments: tuple[Any, ...], **options: int) -> Any:
    """Launches a kernel. Returns a function that launches its binary for similar arguments.

    Those have the same types, alignment and sizes. In the interpreter it returns None.
    """
    binary = kernel[(num_programs,)](*arguments, **options, **FUSION)
    return None if binary is None else binary[(num_programs, 1, 1)]


def _is_per_sample(sample_weight: Tensor | None, shape: torch.Size, dim: int) -> bool:
    """Whether weights that broadcast to elements differ by sample, but not by class."""
    if sample_weight is None or sample_weight.numel() == 1:
        return False
    from_end = len(shape) - dim  # Broadcasting aligns the last dimensions.
    return from_end > sample_weight.dim() or sample_weight.shape[-from_end] == 1


def _strides(
    broadcastable: Tensor | None, shape: Sequence[int], shape_3d: Shape3D
) -> tuple[Strides, bool]:
    """The strides of a tensor broadcast to (outer, classes, inner), and whether that is a copy."""
    if broadcastable is None or broadcastable.numel() == 1:
        return (0, 0, 0), False
    view = _reshape(broadcastable, shape, shape_3d)
    outer_stride, class_stride, inner_stride = view.stride()
    return (outer_stride, class_stride, inner_stride), view.data_ptr() != broadcastable.data_ptr()


def _reshape(broadcastable: Tensor, shape: Sequence[int], shape_3d: Shape3D) -> Tensor:
    """Expands a tensor to `shape` and reshapes it to `shape_3d`, which copies it if it must."""
    return broadcastable.expand(shape).reshape(shape_3d)


class Workspaces:
    """One workspace per stream: partial sums, and a counter that is 0 between launches.

    Launches on one stream run one after the other, so they share a workspace. Launches in a
    captured graph may run beside any other: their partial sums are in the memory of the graph, and
    each has a counter of its own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.scalar = torch.empty((), dtype=dtype, device=device)
        self.by_stream: dict[int | None, tuple[Tensor, Tensor]] = {}

    def find(self, stream: int | None) -> tuple[Tensor, Tensor]:
        """The partial sums and the counter for a launch on the current stream."""
        if stream is not None and torch.cuda.is_current_stream_capturing():
            counter = next(_graph_counters.get(self.device, iter(())), None)
            return self._new(counter)
        workspace = self.by_stream.get(stream)
        if workspace is None:
            workspace = self.by_stream[stream] = self._new()
            if stream is not None and self.device not in _graph_counters:
                # Four integers each: 16 bytes, the alignment that kernels are compiled for.
                size = (GRAPH_COUNTERS, 4)
                counters = torch.zeros(size, dtype=torch.int32, device=self.device)
                torch.cuda.synchronize(self.device)  # Graphs run on other streams.
                _graph_counters[self.device] = map(counters.__getitem__, range(GRAPH_COUNTERS))
        return workspace

    def _new(self, counter: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if counter is None:
            counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        # From each program the sum of its losses, of its weights and of their magnitudes.
        return self.scalar.new_empty(3 * MAX_PROGRAMS), counter


def _find_workspaces(device: torch.device, dtype: torch.dtype) -> Workspaces:
    if (device, dtype) not in _workspaces:
        _workspaces[device, dtype] = Workspaces(device, dtype)
    return _workspaces[device, dtype]
