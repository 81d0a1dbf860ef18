"""Several processes get the loss, the gradient and the trained parameters of one process.

Starting processes takes seconds, so one test runs all cases with the same number of processes. A
fork server, where the system has one, imports torch once for all of them.
"""

import contextlib
import functools
import itertools
import json
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from samples import REDUCTIONS, SAMPLES, Sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchlosses import (
    CrossEntropyError,
    LinearCrossEntropyError,
    SumSquaredError,
    formulas,
    linear,
    sharded,
)
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    placement_types,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

WORLDS = (2, 4)
# Slow imports. In Python 3.11 the fork server does not find this module itself.
PRELOADED = [
    "torch.distributed.fsdp", "torch.distributed.tensor.debug", "torch.testing", "pytest",
    "torch._dynamo",
]  # fmt: skip
COLLECTIVE_TIMEOUT = 60  # Seconds that one process waits for another.
TIMEOUT = 240  # Seconds for all cases of one number of processes.
CASES: dict[int, dict[str, Callable[[], None]]] = {world: {} for world in WORLDS}


def case(
    *arguments: Any, worlds: tuple[int, ...] = WORLDS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a case that every process runs, once for each argument.

    Four processes run the cases where a 2-D mesh or an empty shard matters.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for world in worlds:
            for argument in arguments:
                name = f"{function.__name__}[{argument}]"
                CASES[world][name] = functools.partial(function, argument)
            if not arguments:
                CASES[world][function.__name__] = function
        return function

    return add


def run_cases(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    failures: dict[str, str] = {}
    is_in_step = True
    for name, run in CASES[world].items():
        if not is_in_step:
            failures[name] = "not run: the processes are out of step"
            continue
        torch.manual_seed(0)
        try:
            run()
        # After a failed assertion all processes are still in step; after other errors they may not.
        except (Exception, pytest.fail.Exception) as error:
            failures[name] = traceback.format_exc()
            is_in_step = isinstance(error, (AssertionError, pytest.fail.Exception))
    Path(directory, f"{rank}.json").write_text(json.dumps(failures))
    if is_in_step:
        dist.barrier()  # Otherwise the first process to end aborts the others.
        dist.destroy_process_group()


@pytest.mark.parametrize("world", WORLDS)
def test_cases_in_several_processes(world: int, tmp_path: Path) -> None:
    mp.set_forkserver_preload(PRELOADED)
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    context: Any = mp.start_processes(  # type: ignore[attr-defined]
        run_cases, (world, str(tmp_path)), nprocs=world, join=False, start_method=method
    )
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes have not finished after {TIMEOUT} s")
    failures = [
        f"{name}, process {rank}: {text}"
        for rank in range(world)
        for name, text in json.loads((tmp_path / f"{rank}.json").read_text()).items()
    ]
    assert not failures, "\n".join(failures)


@functools.cache
def meshes() -> list[DeviceMesh]:
    """A 1-D mesh, and for four processes also a 2-D mesh."""
    shapes = [(2,)] if dist.get_world_size() == 2 else [(4,), (2, 2)]
    return [init_device_mesh("cpu", shape) for shape in shapes]


def layouts(mesh: DeviceMesh, rank: int, dim: int) -> list[tuple[Shard | Replicate, ...]]:
    if mesh.ndim == 1:
        return [(Shard(d),) for d in range(rank)] + [(Replicate(),)]
    other = 0 if dim else rank - 1
    return [(Shard(other), Shard(dim)), (Shard(dim), Shard(dim)), (Shard(dim), Replicate())]


def shard(tensor: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    """Every process has the whole tensor and takes its own shard, so nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def placements_of(placements: Any, dims: Any) -> list[Any]:
    """The placements of a tensor that has these dimensions of an input with these placements."""
    return [
        Shard(dims.index(p.dim)) if isinstance(p, Shard) and p.dim in dims else Replicate()
        for p in placements
    ]


def close(actual: Any, expected: Any, mesh: DeviceMesh, placements: Any) -> None:
    """The DTensor has these placements, and its shard is that of the expected tensor."""
    if not expected.numel():  # In torch 2.11 the gradient of an empty input has no placement.
        assert actual.shape == expected.shape
        return
    assert actual.placements == tuple(placements)
    local = shard(expected, mesh, placements).to_local()
    torch.testing.assert_close(actual.to_local(), local, rtol=1e-10, atol=1e-12, equal_nan=True)


def check_sample(sample: Sample, mesh: DeviceMesh, placements: Any, is_plain: bool) -> None:
    input, target, options = sample.tensors(torch.float64)
    rank = input.dim()
    dim = sample.axis
    all_dims = list(range(rank))
    sample_dims = all_dims[:dim] + all_dims[dim + 1 :]
    leaf = input.clone().requires_grad_()
    expected = sample.function(leaf, target, **options)
    expected.sum().backward()

    def shard_along(tensor: Tensor, dims: list[int]) -> Tensor:
        return tensor if is_plain else shard(tensor, mesh, placements_of(placements, dims))

    sharded = shard(input, mesh, placements).requires_grad_()
    target = shard_along(target, sample_dims if sample.is_index else all_dims)
    if "weight" in options:
        options["weight"] = shard_along(options["weight"], [dim])
    if "sample_weight" in options:
        weight = options["sample_weight"]
        weight_dims = all_dims if sample.is_per_element and not sample.is_index else sample_dims
        dims = weight_dims[len(weight_dims) - weight.dim() :]
        dims = [d if n == input.shape[d] else -1 for n, d in zip(weight.shape, dims, strict=True)]
        options["sample_weight"] = shard_along(weight, dims)
    loss = sample.function(sharded, target, **options)
    dims = []
    if sample.options.get("reduction") == "none":
        dims = all_dims if sample.is_per_element else sample_dims
    close(loss, expected.detach(), mesh, placements_of(placements, dims))
    loss.sum().backward()
    close(sharded.grad, leaf.grad, mesh, placements)


def family(sample: Sample) -> str:
    return "-".join(sample.name.split("-")[:3])


FAMILIES = sorted({family(sample) for sample in SAMPLES})


@case(*FAMILIES)
def samples(name: str) -> None:
    """Value, gradient and their placements, with the other arguments as DTensors or plain tensors.

    Two processes check every sample split by class and half of its other layouts. Four check one
    layout of every other sample.
    """
    failed = []
    for sample in (s for s in SAMPLES if family(s) == name and s.input.ndim):
        number = zlib.crc32(sample.name.encode())
        pairs = [(m, p) for m in meshes() for p in layouts(m, sample.input.ndim, sample.axis)]
        if dist.get_world_size() > 2:
            pairs = [pairs[number // 4 % len(pairs)]] if number // 2 % 2 else []
        else:
            by_class = [pair for pair in pairs if pair[1] == (Shard(sample.axis),)]
            others = [pair for pair in pairs if pair not in by_class]
            pairs = by_class + others[number // 2 % 2 :: 2]
        for mesh, placements in pairs:
            try:
                check_sample(sample, mesh, placements, is_plain=number % 2 == 1)
            except AssertionError as error:
                failed.append(f"{sample.name} as {placements}: {error}")
    assert not failed, "\n".join(failed)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "squares": (sum_squared_error, {}),
    "probabilities": (cross_entropy_error, {}),
    "logits": (cross_entropy_error, {"from_logits": True}),
    "smooth": (cross_entropy_error, {"from_logits": True, "label_smoothing": 0.1}),
}


class Traffic(TorchDispatchMode):
    """Records the bytes of each tensor that a collective sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches again for the operations on its shards.
        if func.namespace == "_c10d_functional" and "tensor" not in func.name().split("_"):
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


# Numbers per row that a process sends: the maximum, the sum of exponentials, and in backward the
# gradient of the sum. It also sends the loss, and for a mean the divisor.
SENT_PER_ROW = {"squares": 0, "probabilities": 0, "logits": 3, "smooth": 3}


@case(*FORMS)
def processes_send_only_a_few_numbers_per_sample(form: str) -> None:
    loss, options = FORMS[form]
    samples, classes = 12, 101
    for mesh in meshes():
        placements = [Shard(1)] if mesh.ndim == 1 else [Shard(0), Shard(1)]
        rows = samples if mesh.ndim == 1 else samples // 2
        for is_index in (False, True):
            for reduction in REDUCTIONS:
                input = torch.rand(samples, classes).softmax(1)
                target = torch.randint(classes, (samples,)) if is_index else input.flip(0)
                y = shard(input, mesh, placements).requires_grad_()
                t = shard(target, mesh, placements_of(placements, [0] if is_index else [0, 1]))
                seed = None
                with CommDebugMode() as collectives, Traffic() as traffic:
                    value = loss(y, t, reduction=reduction, **options)
                    if reduction == "none":
                        seed = torch.ones_like(value)
                    value.backward(seed)
                per_row = [rows] * SENT_PER_ROW[form]
                totals = [1] * mesh.ndim
                if reduction == "none":
                    totals = [] if form == "squares" else [rows]
                elif reduction == "mean" and is_index:
                    totals = [1, 1] * mesh.ndim
                where = f"{mesh.ndim}-D, index {is_index}, {reduction}"
                expected = sorted(4 * numbers for numbers in per_row + totals)  # In float32.
                assert sorted(traffic.sizes) == expected, (where, traffic.sizes)
                counts = collectives.get_comm_counts()
                assert sum(counts.values()) == len(traffic.sizes), where
                assert {str(op).rpartition(".")[2] for op, n in counts.items() if n} <= {
                    "all_reduce"
                }, where


@case()
def sample_weights_may_be_tiny_and_those_of_ignored_samples_nan() -> None:
    mesh = meshes()[0]
    x, target = torch.randn(4, 5), torch.tensor([1, -100, 2, 3])
    for weights in ([1.0, torch.nan, 1.0, 2.0], [1e-39, 0.0, 1e-39, 2e-39]):
        weight, leaf = torch.tensor(weights), x.clone().requires_grad_()
        options: dict[str, Any] = {"from_logits": True, "reduction": "mean"}
        expected = cross_entropy_error(leaf, target, sample_weight=weight, **options)
        expected.backward()
        for placements, own in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
            y = shard(x, mesh, placements).requires_grad_()
            loss: Any = cross_entropy_error(
                y, shard(target, mesh, own), sample_weight=shard(weight, mesh, own), **options
            )
            loss.backward()
            torch.testing.assert_close(loss.full_tensor(), expected.detach())
            grad: Any = y.grad
            torch.testing.assert_close(grad.full_tensor(), leaf.grad)


@case(*FORMS)
def a_shard_of_samples_sends_its_sum_once(form: str) -> None:
    """Once per dimension of the mesh, with the divisor if it depends on the targets."""
    loss, options = FORMS[form]
    for mesh in meshes():
        placements = [Shard(0)] * mesh.ndim
        for is_index in (False, True):
            for reduction in REDUCTIONS:
                leaf = torch.rand(9, 5).softmax(1).requires_grad_()
                target = torch.randint(5, (9,)) if is_index else leaf.detach().flip(0)
                expected = loss(leaf, target, reduction=reduction, **options)
                expected.sum().backward()
                y = shard(leaf.detach(), mesh, placements).requires_grad_()
                t = shard(target, mesh, placements)
                with CommDebugMode() as collectives, Traffic() as traffic:
                    value: Any = loss(y, t, reduction=reduction, **options)
                    value.backward(torch.ones_like(value))
                bytes_sent = [] if reduction == "none" else [4] * mesh.ndim
                if reduction == "mean" and is_index:
                    bytes_sent += [4] * mesh.ndim
                assert sorted(traffic.sizes) == bytes_sent, (mesh.ndim, is_index, reduction)
                assert collectives.get_total_counts() == len(bytes_sent)
                torch.testing.assert_close(value.full_tensor(), expected)
                grad: Any = y.grad
                assert grad.placements == tuple(placements)
                torch.testing.assert_close(grad.full_tensor(), leaf.grad)


def one_dimension(placement: Any) -> tuple[DeviceMesh, list[Any]]:
    return meshes()[0], [placement]


@case("dtensor", "plain")
def gradients_of_the_other_arguments(kind: str) -> None:
    """They have the placements of their tensors: here every process has the whole gradient."""
    for loss, options in FORMS.values():
        for is_index in (False, True):
            for placement in (Shard(0), Shard(1)):
                mesh, placements = one_dimension(placement)
                y = torch.rand(6, 7, dtype=torch.float64).softmax(1)
                t: Tensor = torch.randint(7, (6,)) if is_index else y.flip(0)
                rest = {"sample_weight": torch.rand(6, dtype=torch.float64)}
                if loss is cross_entropy_error:
                    rest["weight"] = torch.rand(7, dtype=torch.float64)
                elif not is_index:
                    rest["sample_weight"] = rest["sample_weight"].unsqueeze(1)

                def leaves(
                    wrap: Callable[[Tensor], Tensor],
                    t: Tensor = t,
                    rest: dict[str, Tensor] = rest,
                ) -> dict[str, Tensor]:
                    tensors = {
                        name: wrap(tensor) for name, tensor in (rest | {"target": t}).items()
                    }
                    return {
                        name: tensor.requires_grad_(tensor.is_floating_point())
                        for name, tensor in tensors.items()
                    }

                expected, actual = leaves(Tensor.clone), leaves(Tensor.clone)
                if kind == "dtensor":
                    actual = leaves(functools.partial(shard, mesh=mesh, placements=[Replicate()]))
                value = loss(y, **expected, reduction="mean", **options)
                value.backward()
                sharded = loss(shard(y, mesh, placements), **actual, reduction="mean", **options)
                sharded.backward()
                torch.testing.assert_close(sharded.to_local(), value)
                for name, leaf in actual.items():
                    grad: Any = leaf.grad
                    if isinstance(grad, DTensor):
                        assert grad.placements == (Replicate(),)
                        grad = grad.to_local()
                    torch.testing.assert_close(grad, expected[name].grad)


@case(torch.float16, torch.bfloat16)
def half_precision(dtype: torch.dtype) -> None:
    for loss, options in FORMS.values():
        for placement in (Shard(0), Shard(1)):
            y = torch.rand(6, 7).softmax(1).to(dtype)
            t = torch.randint(7, (6,))
            leaf = y.clone().requires_grad_()
            sharded = shard(y, *one_dimension(placement)).requires_grad_()
            expected, actual = loss(leaf, t, **options), loss(sharded, t, **options)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.to_local(), expected)
            expected.backward()
            actual.backward()
            grad: Any = sharded.grad
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.full_tensor(), leaf.grad)


@case()
def a_shard_without_classes() -> None:
    """Its process runs the same collectives in backward."""
    for loss, options in FORMS.values():
        for classes in (1, 3):
            for is_index in (False, True):
                y = torch.rand(4, classes, dtype=torch.float64).softmax(1)
                t = torch.randint(classes, (4,)) if is_index else y.flip(0)
                mesh, placements = one_dimension(Shard(1))
                weight = (
                    {} if loss is sum_squared_error else {"weight": torch.rand(classes).double()}
                )
                leaf, sharded = y.clone().requires_grad_(), shard(y, mesh, placements)
                sharded.requires_grad_()
                expected = loss(leaf, t, reduction="mean", **options, **weight)
                expected.backward()
                actual = loss(sharded, t, reduction="mean", **options, **weight)
                actual.backward()
                close(actual, expected.detach(), mesh, [Replicate()])
                close(sharded.grad, leaf.grad, mesh, placements)


@case()
def partial_inputs_are_summed() -> None:
    mesh, _ = one_dimension(None)
    x, t = torch.rand(4, 5).double(), torch.randint(5, (4,))
    for loss, options in FORMS.values():
        partial = DTensor.from_local(x / mesh.size(), mesh, [Partial()])
        torch.testing.assert_close(loss(partial, t, **options).to_local(), loss(x, t, **options))


@case()
def uneven_batches_of_the_processes() -> None:
    mesh, placements = one_dimension(Shard(0))
    y, t = torch.rand(10, 5).softmax(1), torch.randint(5, (10,))
    for loss, options in FORMS.values():
        for reduction in ("sum", "mean", "batchmean"):
            own = [
                DTensor.from_local(
                    tensor.split(sizes())[dist.get_rank()],
                    mesh,
                    placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
                for tensor in (y, t)
            ]
            value = loss(own[0], own[1], reduction=reduction, **options)
            expected = loss(y, t, reduction=reduction, **options)
            torch.testing.assert_close(value.to_local(), expected)


def raised(kind: type[Exception], *words: str) -> Any:
    return pytest.raises(kind, match="(?s)" + ".*".join(words))


@case()
def invalid_arguments_are_errors() -> None:
    world = dist.get_world_size()
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(8, 9).softmax(1), torch.randint(9, (8,))
    sharded = shard(y, mesh, by_class)
    for loss, options in FORMS.values():
        with raised(ValueError, "input: got Tensor", "expected a DTensor"):
            loss(y, shard(t, mesh, [Replicate()]), **options)
        with raised(ValueError, "target: got placements", "Shard", "expected", "Replicate"):
            loss(sharded, shard(t, mesh, [Shard(0)]), **options)
        with raised(ValueError, "target: got placements", "expected"):
            loss(sharded, shard(y, mesh, [Shard(0)]), **options)
        with raised(ValueError, "sample_weight: got placements", "expected"):
            loss(sharded, t, sample_weight=shard(torch.rand(8), mesh, [Shard(0)]), **options)
        with raised(ValueError, r"target: got shape \(4,\) for an input of shape \(8, 9\)"):
            loss(sharded, t[:4], **options)
        other = DeviceMesh("cpu", list(reversed(range(world))))
        with raised(ValueError, "target: got DeviceMesh", "expected DeviceMesh"):
            loss(sharded, shard(t, other, [Replicate()]), **options)
    # Shards of other sizes than those into which DTensor splits nine classes.
    sizes = [1, 8] if world == 2 else [1, 6, 1, 1]
    odd = DTensor.from_local(
        y.split(sizes, 1)[dist.get_rank()].contiguous(),
        mesh,
        by_class,
        run_check=False,
        shape=y.shape,
        stride=y.stride(),
    )
    for loss, options in FORMS.values():
        if sizes[dist.get_rank()] != sharded.to_local().shape[1]:
            for target in (t, y):
                with raised(ValueError, "got a shard of shape", "expected"):
                    loss(odd, target, **options)
    dist.barrier()


@case()
def a_bad_class_is_an_error_in_its_process() -> None:
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(8, 9).softmax(1), torch.arange(8)
    t[5] = 9
    for loss, options in FORMS.values():
        for placement in (Shard(1), Replicate()):
            message = r"target: got class 9 at position \(5,\)"
            with raised(IndexError, message) as caught:
                loss(shard(y, mesh, [placement]), t, **options)
            assert "shard" in caught.value.__notes__[0]
        t[5] = -100
        ignored = loss(shard(y, mesh, by_class), t, **options).to_local()
        torch.testing.assert_close(ignored, loss(y, t, **options))
        t[5] = 9
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        raised(ValueError, "input: got 2 at position", "from_logits=True"),
    ):
        y = torch.full((8, 8), 2.0)  # Every shard is invalid.
        cross_entropy_error(shard(y, mesh, by_class), torch.zeros(8, dtype=torch.int64))


@case()
def a_bad_class_is_nan_where_labels_cannot_be_read() -> None:
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(3, 9).softmax(1), torch.tensor([0, 9, -100])
    for loss, options in FORMS.values():
        sharded = shard(y, mesh, by_class).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torchlosses.checks.can_read_values", lambda tensor: False)
            losses = loss(sharded, t, reduction="none", **options)
        by_sample = losses.full_tensor().reshape(3, -1).isnan()
        assert by_sample.all(1).tolist() == by_sample.any(1).tolist() == [False, True, False]
        losses.sum().backward()
        by_class_grad: Any = sharded.grad
        grad = by_class_grad.full_tensor()
        assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, False]
        assert not grad[2].any()


@case()
def a_second_derivative_is_an_error() -> None:
    for placement in (Shard(0), Shard(1)):
        mesh, placements = one_dimension(placement)
        for loss, options in FORMS.values():
            y = shard(torch.rand(4, 5), mesh, placements).requires_grad_()
            value = loss(y, torch.arange(4), **options)
            with raised(NotImplementedError, "create_graph"):
                torch.autograd.grad(value, y, create_graph=True)


@case(Shard(0), Shard(1), worlds=(2,))
def compiled(placement: Any) -> None:
    """All losses in one graph, since each graph takes seconds to compile.

    Only even shards: for uneven ones torch's compiler redistributes the gradient.
    """
    mesh, placements = one_dimension(placement)
    y, t = torch.rand(8, 6).double().softmax(1), torch.randint(6, (8,))
    x, w = torch.randn(8, 3).double(), torch.randn(6, 3).double()

    def losses(y: Tensor, soft: Tensor, t: Tensor, x: Tensor, w: Tensor) -> list[Any]:
        return [
            sum_squared_error(y, soft, reduction="mean"),
            sum_squared_error(y, t),
            cross_entropy_error(y, soft, reduction="mean"),
            cross_entropy_error(y, soft, from_logits=True, reduction="mean", label_smoothing=0.1),
            cross_entropy_error(y, t, from_logits=True, reduction="mean"),
            linear_cross_entropy_error(x, w, soft, reduction="mean"),
            linear_cross_entropy_error(x, w, t, reduction="mean"),
        ]

    leaves = [tensor.clone().requires_grad_() for tensor in (y, x, w)]
    expected = losses(leaves[0], y.flip(0), t, *leaves[1:])
    factors = torch.rand(len(expected)).double()
    (torch.stack(expected) * factors).sum().backward()
    by_row: list[Any] = [placement if placement == Shard(0) else Replicate()]
    by_class: list[Any] = [Replicate() if placement == Shard(0) else Shard(0)]
    own: list[Any] = [
        shard(tensor, mesh, p).requires_grad_()
        for tensor, p in ((y, placements), (x, by_row), (w, by_class))
    ]
    torch._dynamo.reset()
    function = torch.compile(losses, fullgraph=True, backend="aot_eager")
    soft, index = shard(y.flip(0), mesh, placements), shard(t, mesh, by_row)
    actual = function(own[0], soft, index, *own[1:])
    for value, other in zip(actual, expected, strict=True):
        close(value, other.detach(), mesh, [Replicate()])
    sum(value * factor for value, factor in zip(actual, factors.tolist(), strict=True)).backward()
    for leaf, tensor in zip(own, leaves, strict=True):
        close(leaf.grad, tensor.grad, mesh, leaf.placements)


def asynchronous(tensor: Tensor) -> Tensor:
    """The tensor as the result of an all-reduce that may still run, as of a row-parallel layer."""
    mesh = meshes()[0]
    share = tensor if tensor.is_floating_point() else tensor * (dist.get_rank() == 0)
    if tensor.is_floating_point():
        share = tensor / mesh.size()
    partial = DTensor.from_local(share, mesh, [Partial()], run_check=False)
    local = partial.redistribute(placements=[Replicate()], async_op=True).to_local()
    assert type(local) is AsyncCollectiveTensor
    return local


LOSSES: dict[str, tuple[Any, dict[str, Any]]] = FORMS | {
    "linear": (
        lambda x, t, **options: linear_cross_entropy_error(x, torch.eye(5).double(), t, **options),
        {},
    )
}


@case(*LOSSES, worlds=(2,))
def results_of_running_collectives(form: str) -> None:
    """They use the kernels, as plain tensors do, and the linear loss its chunks."""
    loss, options = LOSSES[form]
    for is_index, reduction in itertools.product((False, True), REDUCTIONS):
        y = torch.rand(8, 5).double().softmax(1)
        t = torch.randint(5, (8,)) if is_index else y.flip(0)
        weights = torch.rand(8).double()
        if form == "squares" and not is_index:
            weights = weights.unsqueeze(1)
        leaf, other = y.clone().requires_grad_(), y.clone().requires_grad_()
        named = options | {"reduction": reduction}
        expected = loss(leaf, t, sample_weight=weights, **named)
        upstream = torch.rand_like(expected)
        expected.backward(upstream)
        no_formula = mock.patch.object(formulas, "compute", side_effect=AssertionError("formula"))
        with no_formula, chunks_of(3):
            actual = loss(
                asynchronous(other), asynchronous(t), sample_weight=asynchronous(weights), **named
            )
            assert type(actual) is Tensor
            torch.testing.assert_close(actual, expected)
            actual.backward(upstream)
            with torch.no_grad():
                torch.testing.assert_close(loss(asynchronous(y), t, **named), loss(y, t, **named))
        # The gradient reaches the share, which is the tensor divided by the number of processes.
        grad: Any = other.grad
        torch.testing.assert_close(grad * dist.get_world_size(), leaf.grad)
        tensor, target = asynchronous(other), asynchronous(t)
        value = loss(tensor, target, **named)
        with torch.no_grad():
            target.zero_()
        torch.testing.assert_close(
            torch.autograd.grad(value, tensor, upstream, retain_graph=True),
            torch.autograd.grad(loss(leaf, t, **named), leaf, upstream),
        )
        tensor = asynchronous(y).detach().requires_grad_()
        value = loss(tensor, t, **named)
        with torch.no_grad():
            tensor.zero_()
        with raised(RuntimeError, "modified by an inplace operation"):
            value.backward(upstream)
        (first,) = torch.autograd.grad(loss(leaf, t, **named).sum(), leaf, create_graph=True)
        tensor = asynchronous(other)
        (second,) = torch.autograd.grad(loss(tensor, t, **named).sum(), tensor, create_graph=True)
        torch.testing.assert_close(
            torch.autograd.grad(second.square().sum(), tensor, allow_unused=True),
            torch.autograd.grad(first.square().sum(), leaf, allow_unused=True),
        )
    partial = DTensor.from_local(y / 2, meshes()[0], [Partial()], run_check=False)
    whole: Any = partial.redistribute(placements=[Replicate()], async_op=True)
    if form != "linear":
        with mock.patch.object(formulas, "compute", side_effect=AssertionError("formula")):
            torch.testing.assert_close(loss(whole, t, **options).to_local(), loss(y, t, **options))


@case(worlds=(2,))
def results_of_running_collectives_in_a_graph() -> None:
    """They use the operator if plain tensors do."""
    x, w, t = torch.rand(8, 5).double(), torch.rand(7, 5).double(), torch.randint(7, (8,))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    for input in (x, asynchronous(x)):
        torch._dynamo.reset()
        function = torch.compile(linear_cross_entropy_error, fullgraph=True, backend=backend)
        torch.testing.assert_close(function(input, w, t), linear_cross_entropy_error(x, w, t))
    has_operator = ["ops.torchlosses" in graph for graph in graphs]
    assert has_operator in ([True, True], [False, False])


# "compiled" first: after an eager embedding of such DTensors torch fails to trace one.
@case("compiled", "eager", worlds=(2,))
def hidden_states_of_a_sharded_embedding(mode: str) -> None:
    """They have a private placement, a partial sum with a mask."""
    mesh = meshes()[0]
    words, w, b = torch.randn(8, 4).double(), torch.randn(8, 4).double(), torch.randn(8).double()
    ids, t, soft = torch.arange(8).flip(0), torch.randint(8, (8,)), torch.rand(8, 8).double()

    def losses(words: Tensor, w: Tensor, b: Tensor, ids: Tensor, *targets: Tensor) -> list[Any]:
        results = [  # A new embedding for each loss: torch reads such a partial sum only once.
            linear_cross_entropy_error(
                F.embedding(ids, words), weight, target, linear_bias=b, reduction="mean"
            )
            for target in targets
            for weight in (w, words)  # The second is tied to the embedding.
        ]
        if mode == "compiled":
            return results
        return [*results, cross_entropy_error(F.embedding(ids, words), t % 4, from_logits=True)]

    leaves = [tensor.clone().requires_grad_() for tensor in (words, w, b)]
    own: list[Any] = [shard(tensor, mesh, [Shard(0)]).requires_grad_() for tensor in (words, w, b)]
    replicated: Any = shard(ids, mesh, [Replicate()])
    targets = [(t, shard(t, mesh, [Replicate()]))]
    function: Any = losses
    if mode == "compiled":
        torch._dynamo.reset()
        function = torch.compile(losses, fullgraph=True, backend="aot_eager")
    else:
        targets.append((soft, shard(soft, mesh, [Shard(1)])))
        hidden: Any = F.embedding(replicated, own[0])
        assert type(hidden.placements[0]).__name__ == "_MaskPartial"
    expected = losses(*leaves, ids, *(whole for whole, _ in targets))
    with chunks_of(3):
        actual = function(*own, replicated, *(sharded_target for _, sharded_target in targets))
    for value, other in zip(actual, expected, strict=True):
        close(value, other.detach(), mesh, [Replicate()])
    sum(expected).backward()
    sum(actual).backward()
    for leaf, tensor in zip(own, leaves, strict=True):
        close(leaf.grad, tensor.grad, mesh, [Shard(0)])


def can_flatten_sharded_time() -> bool:
    """Whether this torch flattens a tensor whose second dimension is sharded."""
    if torch.__version__ >= "2.14":
        return True
    try:
        shard(torch.ones(2, 2), meshes()[0], [Shard(1)]).flatten()
    except RuntimeError:
        return False
    return True


@case("eager")
@case("compiled", worlds=(2,))
def logits_sharded_over_time_and_flattened(mode: str) -> None:
    if not can_flatten_sharded_time():
        return
    if mode == "compiled" and torch.__version__ < "2.13":
        return  # torch 2.12 fails to compile a flattened DTensor, even without a loss.

    # One loss in a graph, which compiles slowly, and in four processes.
    is_slow = mode == "compiled" or dist.get_world_size() > 2
    forms = {"smooth": FORMS["smooth"]} if is_slow else FORMS
    reductions = ("mean",) if mode == "compiled" else ("none", "mean")

    def losses(y: Tensor, soft: Tensor, t: Tensor, w: Tensor, x: Tensor, v: Tensor) -> list[Any]:
        y, soft, t, w, x = (tensor.flatten(0, 1) for tensor in (y, soft, t, w, x))
        results = [
            loss(
                y, target, reduction=reduction, **options,
                sample_weight=w[:, None] if target is soft and form == "squares" else w,
            )
            for form, (loss, options) in forms.items()
            for target in ((soft, t) if is_slow else (soft, t, whole.flatten()))
            for reduction in reductions
        ]  # fmt: skip
        return [*results, linear_cross_entropy_error(x, v, t, reduction="mean")]

    for mesh in meshes():
        splits = [[Shard(1)]] if mesh.ndim == 1 else [[Shard(0), Shard(1)], [Shard(2), Shard(1)]]
        # For uneven shards torch's compiler redistributes the gradient.
        times = 7 if mesh.ndim == 1 and mode == "eager" else 6
        y = torch.rand(4, times, 6).double().softmax(2)
        whole, w = torch.randint(6, (4, times)), torch.rand(4, times).double()
        x, v = torch.rand(4, times, 3).double(), torch.rand(6, 3).double()
        tensors = (y, y.flip(0), whole, w, x, v)
        leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in tensors]
        expected = losses(*leaves)
        sum(value.sum() for value in expected).backward()
        for placements in splits:
            rows = placements_of(placements, [0, 1])
            by_class = [Shard(0) if p == Shard(2) else Replicate() for p in placements]
            own: list[Any] = [
                shard(tensor, mesh, p).requires_grad_(tensor.is_floating_point())
                for tensor, p in zip(
                    tensors, (placements, placements, rows, rows, rows, by_class), strict=True
                )
            ]
            function: Any = losses
            if mode == "compiled":
                torch._dynamo.reset()
                function = torch.compile(losses, fullgraph=True, backend="aot_eager")
            else:
                assert "_StridedShard" in {
                    type(p).__name__ for p in own[0].flatten(0, 1).placements
                }
            actual = function(*own)
            for value, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(value.full_tensor(), other)
            sum(value.sum() for value in actual).backward()
            for leaf, tensor in zip(own, leaves, strict=True):
                if tensor.is_floating_point():
                    close(leaf.grad, tensor.grad, mesh, leaf.placements)


@case(worlds=(2,))
def pixels_sharded_over_the_width_and_flattened() -> None:
    """The flattened dimension has another index in a target without the class dimension."""
    if not can_flatten_sharded_time():
        return
    mesh = meshes()[0]
    y, t = torch.rand(2, 3, 4, 6).double().softmax(1), torch.randint(3, (2, 4, 6))
    for (loss, options), is_index in itertools.product(FORMS.values(), (False, True)):
        leaf, own = y.clone().requires_grad_(), shard(y, mesh, [Shard(3)]).requires_grad_()
        target = t if is_index else y.flip(0)
        named = options | {"reduction": "none"}
        expected = loss(leaf.flatten(2), target.flatten(-2), **named)
        sharded_target = shard(target, mesh, [Shard(target.dim() - 1)])
        actual = loss(own.flatten(2), sharded_target.flatten(-2), **named)
        torch.testing.assert_close(actual.full_tensor(), expected)
        upstream = torch.rand_like(expected)
        expected.backward(upstream)
        actual.backward(shard(upstream, mesh, actual.placements))
        close(own.grad, leaf.grad, mesh, [Shard(3)])
    classes = shard(y, mesh, [Shard(3)]).flatten(2).transpose(1, 2)
    with raised(ValueError, "input: got placements", "_StridedShard where it does not cut classes"):
        cross_entropy_error(classes, t.flatten(1)[:, :3] * 0, from_logits=True, dim=1)


@functools.cache
def half_mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size() // 2)))


@case()
def a_process_outside_of_the_mesh_has_no_values() -> None:
    """As in all operations of torch; inside the mesh the loss is correct."""
    mesh = half_mesh()
    is_outside = mesh.get_coordinate() is None
    assert is_outside == (dist.get_rank() >= mesh.size())

    def check(actual: Any, expected: Any, placements: Any) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if is_outside:
            assert not actual.to_local().any()
        else:
            close(actual, expected, mesh, placements)

    for (loss, options), is_index, reduction, placement in itertools.product(
        FORMS.values(), (False, True), ("mean", "none"), (Shard(0), Shard(1))
    ):
        y = torch.rand(6, 4).double().softmax(1)
        t = torch.randint(4, (6,)) if is_index else y.flip(0)
        leaf, own = y.clone().requires_grad_(), shard(y, mesh, [placement]).requires_grad_()
        expected, actual = (loss(v, t, reduction=reduction, **options) for v in (leaf, own))
        dims = [0, 1] if loss is sum_squared_error else [0]
        placements = placements_of([placement], dims) if reduction == "none" else [Replicate()]
        check(actual, expected.detach(), placements)
        expected.sum().backward()
        actual.sum().backward()
        check(own.grad, leaf.grad, [placement])
    x, w, t = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.randint(4, (6,))
    own = shard(x, mesh, [Replicate()]).requires_grad_()
    layer = shard(w, mesh, [Shard(0)]).requires_grad_()
    actual = linear_cross_entropy_error(own, layer, t)
    expected = linear_cross_entropy_error(x.requires_grad_(), w.requires_grad_(), t)
    check(actual, expected.detach(), [Replicate()])
    actual.backward()
    expected.backward()
    check(own.grad, x.grad, [Replicate()])
    check(layer.grad, w.grad, [Shard(0)])


@case(worlds=(2,))
def a_transform_is_an_error() -> None:
    mesh, placements = one_dimension(Shard(0))
    y, t = torch.rand(8, 5).softmax(1), torch.randint(5, (8,))
    x, w = shard(y, mesh, placements), shard(torch.rand(5, 5), mesh, [Replicate()])
    for loss, options in LOSSES.values():
        if loss is not LOSSES["linear"][0]:
            for target in (t, shard(t, mesh, placements)):
                for transform in (torch.func.grad, torch.func.jacrev):
                    with raised(NotImplementedError, "torch.func: got a transform"):
                        transform(functools.partial(loss, target=target, **options))(x)
            weighted = functools.partial(loss, x, t, **options)
            with raised(NotImplementedError, "torch.func: got a transform"):
                torch.func.grad(lambda s, loss=weighted: loss(sample_weight=s))(torch.rand(8))
    for position in (0, 1):
        with raised(NotImplementedError, "torch.func: got a transform"):
            torch.func.grad(linear_cross_entropy_error, argnums=position)(x, w, t)


def test_this_torch_has_the_private_names_in_use() -> None:
    """Without them losses would silently take such tensors for plain ones."""
    assert issubclass(placement_types._StridedShard, placement_types.Placement)
    assert callable(AsyncCollectiveTensor.wait)
    tensor = torch.ones(2)

    def unwrap(x: Tensor) -> Tensor:
        assert x is not tensor
        assert sharded._unwrapped(x) is tensor
        return x

    torch.vmap(unwrap)(tensor)


def sizes() -> list[int]:
    """How many of ten samples each process has; one of four processes has none."""
    return [7, 3] if dist.get_world_size() == 2 else [5, 0, 1, 4]


def criteria(reduction: Any) -> Iterator[tuple[nn.Module, bool]]:
    """Each loss, and whether it takes class indices."""
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    for is_index in (False, True):
        yield SumSquaredError(reduction=reduction), is_index
        for from_logits in (False, True):
            yield CrossEntropyError(from_logits=from_logits, reduction=reduction), is_index
    yield CrossEntropyError(from_logits=True, reduction=reduction, weight=weight), True


def count(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    """The part of the reduction's divisor that this process's samples add."""
    if criterion.reduction == "batchmean":
        return torch.tensor(float(len(logits)), dtype=logits.dtype)
    per_sample = torch.ones(len(logits), dtype=logits.dtype)
    if target.dim() == 1:
        per_sample = (target != criterion.ignore_index).to(logits.dtype)
        if getattr(criterion, "weight", None) is not None:
            per_sample = per_sample * criterion.weight[target.clamp(min=0)]
    return per_sample.sum() * (logits.shape[1] if isinstance(criterion, SumSquaredError) else 1)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batches(is_index: bool) -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(10, 6, dtype=torch.float64, generator=generator)
        t = torch.randn(10, 5, dtype=torch.float64, generator=generator).softmax(1)
        if is_index:
            t = t.argmax(1)
            t[seed] = -100
        yield x, t


def output(model: nn.Module, criterion: Any, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y if getattr(criterion, "from_logits", True) else y.softmax(1)


def train(model: nn.Module, criterion: Any, is_index: bool, is_split: bool) -> None:
    """SGD on whole batches, or on this process's part by the recipe in `examples/recipes.md`."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    reduction = criterion.reduction
    for x, t in batches(is_index):
        if is_split:
            x, t = (tensor.split(sizes())[dist.get_rank()] for tensor in (x, t))
            y = output(model, criterion, x)
            divisor = torch.ones((), dtype=y.dtype)
            if reduction in ("mean", "batchmean"):
                divisor = count(criterion, y, t)
                dist.all_reduce(divisor)
            criterion.reduction = "sum"
            loss = criterion(y, t) * dist.get_world_size() / divisor
            criterion.reduction = reduction
        else:
            loss = criterion(output(model, criterion, x), t).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parallel_network(kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(network())
    model = network()
    fully_shard(model)
    return model


@case("ddp-mean", "ddp-none", "fsdp-mean", "fsdp-none")
@case("ddp-sum", "ddp-batchmean", "fsdp-sum", "fsdp-batchmean", worlds=(2,))
def data_parallel(name: str) -> None:
    kind, reduction = name.split("-")
    for criterion, is_index in criteria(reduction):
        expected, model = network(), parallel_network(kind)
        train(expected, criterion, is_index, is_split=False)
        train(model, criterion, is_index, is_split=True)
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(whole.data, other.data, rtol=1e-10, atol=1e-12)


@case()
def a_mean_of_means_is_not_the_mean() -> None:
    """Hence the recipe."""
    x, t = next(batches(True))
    y, target = (tensor.split(sizes())[dist.get_rank()] for tensor in (x, t))
    mean = CrossEntropyError(from_logits=True, reduction="mean")(y, target)
    dist.all_reduce(mean)
    expected = CrossEntropyError(from_logits=True, reduction="mean")(x, t)
    assert (mean / dist.get_world_size() - expected).abs() > 1e-3


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Limits chunks to this many rows in float64."""
    with mock.patch.object(linear, "CHUNK_BYTES_PER_CLASS", 8 * rows):
        yield


def layer_placements(mesh: DeviceMesh) -> list[tuple[Any, Any]]:
    """Placements of a linear layer's input and weight."""
    if mesh.ndim == 1:
        return [([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()])]
    return [([Shard(0), Replicate()], [Replicate(), Shard(0)])]


@case(*REDUCTIONS)
def a_linear_layer_sharded_by_class_or_by_row(reduction: Any) -> None:
    x, w, b = torch.randn(8, 3, 4).double(), torch.randn(9, 4).double(), torch.randn(9).double()
    soft, index = torch.rand(8, 3, 9).double().softmax(-1), torch.randint(9, (8, 3))
    index[2:4, 1] = -100
    weights = {"weight": torch.rand(9).double(), "sample_weight": torch.rand(8, 3).double()}
    options: dict[str, Any]
    for target, options, mesh in itertools.product(
        (soft, index), ({}, weights | {"label_smoothing": 0.1}), meshes()
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
        named: dict[str, Any] = options | {"reduction": reduction}
        logits = F.linear(*leaves)
        expected = cross_entropy_error(logits, target, from_logits=True, dim=-1, **named)
        upstream = torch.rand_like(expected)
        expected.backward(upstream)
        for by_row, by_class in layer_placements(mesh):
            own: list[Any] = [
                shard(tensor, mesh, placements).requires_grad_()
                for tensor, placements in ((x, by_row), (w, by_class), (b, by_class))
            ]
            if "sample_weight" in options:
                named["sample_weight"] = shard(weights["sample_weight"], mesh, by_row)
            sharded_target = shard(target, mesh, target_placements(by_row, by_class, target))
            with chunks_of(9):
                loss: Any = linear_cross_entropy_error(
                    own[0], own[1], sharded_target, linear_bias=own[2], **named
                )
                placements = by_row if reduction == "none" else [Replicate()] * mesh.ndim
                close(loss, expected.detach(), mesh, placements)
                loss.backward(shard(upstream, mesh, placements))
            for leaf, tensor in zip(own, leaves, strict=True):
                close(leaf.grad, tensor.grad, mesh, leaf.placements)


def target_placements(by_row: Any, by_class: Any, target: Tensor) -> list[Any]:
    """Placements of a target that goes with the layer: soft targets are sharded by class too."""
    soft = [Shard(2) if q.is_shard() else p for p, q in zip(by_row, by_class, strict=True)]
    return soft if target.dim() == 3 else list(by_row)


@case()
def a_linear_layer_sends_numbers_per_row_and_the_gradient_of_the_input() -> None:
    rows, width, classes = 12, 4, 101
    mesh = meshes()[0]
    x = shard(torch.randn(rows, width), mesh, [Replicate()]).requires_grad_()
    w = shard(torch.randn(classes, width), mesh, [Shard(0)]).requires_grad_()
    with CommDebugMode() as collectives, Traffic() as traffic, chunks_of(3):
        linear_cross_entropy_error(x, w, torch.randint(classes, (rows,))).backward()
    # Per chunk the maximum and the sum, both again in backward, and the gradient of the sum.
    chunk = 6  # Rows in float32.
    expected = [chunk * 4] * (rows // chunk * 5) + [4, rows * width * 4]
    assert sorted(traffic.sizes) == sorted(expected)
    counts = collectives.get_comm_counts()
    assert {str(op).rpartition(".")[2] for op, n in counts.items() if n} == {"all_reduce"}


@case(worlds=(2,))
def a_linear_layer_in_half_precision_accumulates_in_float32() -> None:
    mesh = meshes()[0]
    x, w = torch.rand(4096, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    t = torch.zeros(4096, dtype=torch.int64)
    leaf = w.double().requires_grad_()
    cross_entropy_error(x.double() @ leaf.T, t, from_logits=True).backward()
    own: Any = shard(w, mesh, [Shard(0)]).requires_grad_()
    with chunks_of(8):
        linear_cross_entropy_error(shard(x, mesh, [Replicate()]), own, t).backward()
    exact: Any = leaf.grad
    error = own.grad.full_tensor() - exact
    assert error.abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@case(*REDUCTIONS, worlds=(2,))
def an_argument_that_changes_before_backward_is_an_error(reduction: Any) -> None:
    mesh = meshes()[0]
    for by_row, by_class in (([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()])):
        for name in ("input", "linear_weight", "linear_bias"):
            arguments: dict[str, Any] = {
                "input": shard(torch.randn(8, 4), mesh, by_row).requires_grad_(),
                "linear_weight": shard(torch.randn(12, 4), mesh, by_class).requires_grad_(),
                "linear_bias": shard(torch.randn(12), mesh, by_class).requires_grad_(),
            }
            leaves = tuple(arguments.values())
            target = shard(torch.randint(12, (8,)), mesh, by_row)
            loss: Any = linear_cross_entropy_error(target=target, reduction=reduction, **arguments)
            with torch.no_grad():
                arguments[name].mul_(2)
            with raised(RuntimeError, "modified by an inplace operation"):
                torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        x = leaves[0]
        loss = cross_entropy_error(x, target % 4, from_logits=True, reduction=reduction)
        with torch.no_grad():
            x.mul_(2)
        with raised(RuntimeError, "modified by an inplace operation"):
            torch.autograd.grad(loss, x, torch.ones_like(loss))


@case("mean", "none")
def a_linear_layer_resharded_after_forward(reduction: Any) -> None:
    def model() -> ModelWithLoss:
        torch.manual_seed(0)
        return ModelWithLoss(reduction)

    x, t = torch.randn(8, 4).double(), torch.randint(9, (8,))
    expected, sharded, world = model(), model(), dist.get_world_size()
    fully_shard(sharded.criterion, reshard_after_forward=True)
    fully_shard(sharded)
    expected(x, t).sum().backward()
    with chunks_of(1):
        loss = sharded(*(tensor.chunk(world)[dist.get_rank()] for tensor in (x, t))).sum()
        for _ in range(2):
            sharded.zero_grad()
            (loss * (world if reduction == "none" else 1)).backward(retain_graph=True)
    for parameter, other in zip(sharded.parameters(), expected.parameters(), strict=True):
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor(), other.grad)


class ModelWithLoss(nn.Module):
    def __init__(self, reduction: Any) -> None:
        super().__init__()
        own: Any = {"dtype": torch.float64}
        self.body = nn.Linear(4, 4, **own)
        self.criterion = LinearCrossEntropyError(4, 9, bias=True, reduction=reduction, **own)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.criterion(self.body(x), t)


@case("ddp", "fsdp")
def a_data_parallel_linear_loss(kind: str) -> None:
    def model() -> LinearCrossEntropyError:
        torch.manual_seed(0)
        return LinearCrossEntropyError(4, 9, bias=True, dtype=torch.float64)

    x, t = torch.randn(8, 4).double(), torch.randint(9, (8,))
    expected: nn.Module = model()
    expected(x, t).backward()
    parallel: nn.Module = model()
    if kind == "ddp":
        parallel = DistributedDataParallel(parallel)
    else:
        fully_shard(parallel)
    world = dist.get_world_size()
    own = [tensor.chunk(world)[dist.get_rank()] for tensor in (x, t)]
    with chunks_of(1):
        (parallel(*own) * world).backward()
    for parameter, other in zip(parallel.parameters(), expected.parameters(), strict=True):
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor() if kind == "fsdp" else grad, other.grad)


@case()
def fully_shard_on_the_linear_layer_alone() -> None:
    torch.manual_seed(0)
    criterion = LinearCrossEntropyError(4, 8)
    weight = criterion.linear.weight.detach().clone().requires_grad_()
    x, t = torch.randn(8, 4), torch.randint(8, (8,))
    fully_shard(criterion.linear)
    loss, expected = criterion(x, t), linear_cross_entropy_error(x, weight, t)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    grad: Any = criterion.linear.weight.grad
    torch.testing.assert_close(grad.full_tensor(), weight.grad)


@case()
def unsupported_placements_of_a_linear_layer_are_errors() -> None:
    mesh = meshes()[0]
    x, w, t = torch.randn(8, 4), torch.randn(8, 4), torch.randint(8, (8,))
    by_class = shard(w, mesh, [Shard(0)])
    replicated = shard(x, mesh, [Replicate()])
    with raised(ValueError, "input: got a plain tensor beside a DTensor", "fully_shard"):
        linear_cross_entropy_error(x, by_class, t)
    with raised(ValueError, "linear_weight: got a plain tensor"):
        linear_cross_entropy_error(replicated, w, t)
    with raised(ValueError, "linear_weight: got placements", "expected", r"Shard\(0\)"):
        linear_cross_entropy_error(replicated, shard(w, mesh, [Shard(1)]), t)
    for placement in (Shard(0), Shard(1)):
        with raised(ValueError, "input: got placements", "expected Replicate"):
            linear_cross_entropy_error(shard(x, mesh, [placement]), by_class, t)
    other = DeviceMesh("cpu", list(reversed(range(dist.get_world_size()))))
    with raised(ValueError, "input: got DeviceMesh", "expected DeviceMesh"):
        linear_cross_entropy_error(shard(x, other, [Replicate()]), by_class, t)
    with raised(ValueError, "linear_bias: got DeviceMesh", "expected DeviceMesh"):
        bias = shard(w[:, 0], other, [Replicate()])
        linear_cross_entropy_error(replicated, by_class, t, linear_bias=bias)
    soft = shard(torch.ones(8, 8), mesh, [Shard(0)])
    by_row = (shard(x, mesh, [Shard(0)]), shard(w, mesh, [Replicate()]))
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match=r"target: the row at position \(0,\)"),
    ):
        linear_cross_entropy_error(*by_row, soft)
    loss = linear_cross_entropy_error(replicated.requires_grad_(), by_class, t)
    with raised(NotImplementedError, "create_graph"):
        torch.autograd.grad(loss, replicated, create_graph=True)
