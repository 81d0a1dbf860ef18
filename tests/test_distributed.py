"""Several processes get the loss, the gradient and the parameters of one.

To start processes takes seconds, so those of one number run all cases in a row, as one test. Where
the system can fork, they are forked from a process that has imported torch and done no more.
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
# What takes long to import. The process that is forked does not find this module in Python 3.11.
PRELOADED = [
    "torch.distributed.fsdp", "torch.distributed.tensor.debug", "torch.testing", "pytest",
    "torch._dynamo",
]  # fmt: skip
PATIENCE = 60  # Seconds that one process waits for another.
LIMIT = 240  # Seconds for all cases of one number of processes.
CASES: dict[int, dict[str, Callable[[], None]]] = {world: {} for world in WORLDS}


def case(
    *arguments: Any, worlds: tuple[int, ...] = WORLDS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run by every process, once for each argument.

    Four processes run the cases where a mesh of two dimensions or an empty shard matters.
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


def work(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    failures: dict[str, str] = {}
    in_step = True
    for name, run in CASES[world].items():
        if not in_step:
            failures[name] = "not run: the processes are out of step"
            continue
        torch.manual_seed(0)
        try:
            run()
        # A wrong number, or no error where one is due, leaves all in step, and little else does.
        except (Exception, pytest.fail.Exception) as error:
            failures[name] = traceback.format_exc()
            in_step = isinstance(error, (AssertionError, pytest.fail.Exception))
    Path(directory, f"{rank}.json").write_text(json.dumps(failures))
    if in_step:
        dist.barrier()  # Without it the process that ends first aborts the others.
        dist.destroy_process_group()


@pytest.mark.parametrize("world", WORLDS)
def test_processes(world: int, tmp_path: Path) -> None:
    mp.set_forkserver_preload(PRELOADED)
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    context: Any = mp.start_processes(  # type: ignore[attr-defined]
        work, (world, str(tmp_path)), nprocs=world, join=False, start_method=method
    )
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes were not through after {LIMIT} s")
    failures = [
        f"{name}, process {rank}: {text}"
        for rank in range(world)
        for name, text in json.loads((tmp_path / f"{rank}.json").read_text()).items()
    ]
    assert not failures, "\n".join(failures)


@functools.cache
def meshes() -> list[DeviceMesh]:
    """One dimension, and for four processes two."""
    shapes = [(2,)] if dist.get_world_size() == 2 else [(4,), (2, 2)]
    return [init_device_mesh("cpu", shape) for shape in shapes]


def layouts(mesh: DeviceMesh, rank: int, dim: int) -> list[tuple[Shard | Replicate, ...]]:
    if mesh.ndim == 1:
        return [(Shard(d),) for d in range(rank)] + [(Replicate(),)]
    other = 0 if dim else rank - 1
    return [(Shard(other), Shard(dim)), (Shard(dim), Shard(dim)), (Shard(dim), Replicate())]


def spread(tensor: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    """The same on every process, so each cuts out its own and nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def beside(placements: Any, dims: Any) -> list[Any]:
    """How a tensor lies that has the input's `dims` and goes with its shards."""
    return [
        Shard(dims.index(p.dim)) if isinstance(p, Shard) and p.dim in dims else Replicate()
        for p in placements
    ]


def close(actual: Any, expected: Any, mesh: DeviceMesh, placements: Any) -> None:
    """The placements are these, and the shard is that of the expected tensor."""
    if not expected.numel():  # torch 2.11 leaves no placement to a gradient of nothing.
        assert actual.shape == expected.shape
        return
    assert actual.placements == tuple(placements)
    shard = spread(expected, mesh, placements).to_local()
    torch.testing.assert_close(actual.to_local(), shard, rtol=1e-10, atol=1e-12, equal_nan=True)


def check_sample(sample: Sample, mesh: DeviceMesh, placements: Any, is_plain: bool) -> None:
    input, target, options = sample.tensors(torch.float64)
    rank = input.dim()
    dim = sample.axis
    every = list(range(rank))
    rows = every[:dim] + every[dim + 1 :]
    leaf = input.clone().requires_grad_()
    expected = sample.function(leaf, target, **options)
    expected.sum().backward()

    def part(tensor: Tensor, dims: list[int]) -> Tensor:
        return tensor if is_plain else spread(tensor, mesh, beside(placements, dims))

    sharded = spread(input, mesh, placements).requires_grad_()
    target = part(target, rows if sample.is_index else every)
    if "weight" in options:
        options["weight"] = part(options["weight"], [dim])
    if "sample_weight" in options:
        weight = options["sample_weight"]
        lost = every if sample.loss == "sum_squared_error" and not sample.is_index else rows
        dims = lost[len(lost) - weight.dim() :]
        dims = [d if n == input.shape[d] else -1 for n, d in zip(weight.shape, dims, strict=True)]
        options["sample_weight"] = part(weight, dims)
    loss = sample.function(sharded, target, **options)
    dims = []
    if sample.options.get("reduction") == "none":
        dims = every if sample.loss == "sum_squared_error" else rows
    close(loss, expected.detach(), mesh, beside(placements, dims))
    loss.sum().backward()
    close(sharded.grad, leaf.grad, mesh, placements)


def family(sample: Sample) -> str:
    return "-".join(sample.name.split("-")[:3])


FAMILIES = sorted({family(sample) for sample in SAMPLES})


@case(*FAMILIES)
def samples(name: str) -> None:
    """Value, gradient and their placements, with other arguments as DTensors and as they are.

    Two processes take every sample cut by class, and every other one of the other layouts; four
    take one layout of every other sample.
    """
    failed = []
    for sample in (s for s in SAMPLES if family(s) == name and s.input.ndim):
        number = zlib.crc32(sample.name.encode())
        ways = [(m, w) for m in meshes() for w in layouts(m, sample.input.ndim, sample.axis)]
        if dist.get_world_size() > 2:
            ways = [ways[number // 4 % len(ways)]] if number // 2 % 2 else []
        else:
            by_class = [way for way in ways if way[1] == (Shard(sample.axis),)]
            others = [way for way in ways if way not in by_class]
            ways = by_class + others[number // 2 % 2 :: 2]
        for mesh, placements in ways:
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
    """The bytes of each tensor that goes to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # It is asked again for what is done with the shards.
        if func.namespace == "_c10d_functional" and "tensor" not in func.name().split("_"):
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


# Rows of one process, and how many numbers per row it sends: maximum and sum of exponentials, and
# on the way back the gradient of the sum. Beside them goes the loss, and for a mean a divisor.
TRAVELS = {"squares": 0, "probabilities": 0, "logits": 3, "smooth": 3}


@case(*FORMS)
def only_numbers_per_sample_travel(form: str) -> None:
    loss, options = FORMS[form]
    samples, classes = 12, 101
    for mesh in meshes():
        placements = [Shard(1)] if mesh.ndim == 1 else [Shard(0), Shard(1)]
        rows = samples if mesh.ndim == 1 else samples // 2
        for is_index in (False, True):
            for reduction in REDUCTIONS:
                input = torch.rand(samples, classes).softmax(1)
                target = torch.randint(classes, (samples,)) if is_index else input.flip(0)
                y = spread(input, mesh, placements).requires_grad_()
                t = spread(target, mesh, beside(placements, [0] if is_index else [0, 1]))
                seed = None
                with CommDebugMode() as collectives, Traffic() as traffic:
                    value = loss(y, t, reduction=reduction, **options)
                    if reduction == "none":
                        seed = torch.ones_like(value)
                    value.backward(seed)
                per_row = [rows] * TRAVELS[form]
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
def weights_may_be_tiny_or_not_finite_where_samples_are_ignored() -> None:
    mesh = meshes()[0]
    x, target = torch.randn(4, 5), torch.tensor([1, -100, 2, 3])
    for weights in ([1.0, torch.nan, 1.0, 2.0], [1e-39, 0.0, 1e-39, 2e-39]):
        weight, leaf = torch.tensor(weights), x.clone().requires_grad_()
        options: dict[str, Any] = {"from_logits": True, "reduction": "mean"}
        expected = cross_entropy_error(leaf, target, sample_weight=weight, **options)
        expected.backward()
        for placements, own in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
            y = spread(x, mesh, placements).requires_grad_()
            loss: Any = cross_entropy_error(
                y, spread(target, mesh, own), sample_weight=spread(weight, mesh, own), **options
            )
            loss.backward()
            torch.testing.assert_close(loss.full_tensor(), expected.detach())
            grad: Any = y.grad
            torch.testing.assert_close(grad.full_tensor(), leaf.grad)


@case(*FORMS)
def a_batch_shard_sends_its_sum_once(form: str) -> None:
    """Once in each dimension of the mesh, and beside it the divisor if the targets make it."""
    loss, options = FORMS[form]
    for mesh in meshes():
        placements = [Shard(0)] * mesh.ndim
        for is_index in (False, True):
            for reduction in REDUCTIONS:
                leaf = torch.rand(9, 5).softmax(1).requires_grad_()
                target = torch.randint(5, (9,)) if is_index else leaf.detach().flip(0)
                expected = loss(leaf, target, reduction=reduction, **options)
                expected.sum().backward()
                y = spread(leaf.detach(), mesh, placements).requires_grad_()
                t = spread(target, mesh, placements)
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
    """They come back as their tensors are, whole on every process where those are whole."""
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
                    made = {name: wrap(tensor) for name, tensor in (rest | {"target": t}).items()}
                    return {
                        name: tensor.requires_grad_(tensor.is_floating_point())
                        for name, tensor in made.items()
                    }

                expected, actual = leaves(Tensor.clone), leaves(Tensor.clone)
                if kind == "dtensor":
                    actual = leaves(functools.partial(spread, mesh=mesh, placements=[Replicate()]))
                value = loss(y, **expected, reduction="mean", **options)
                value.backward()
                sharded = loss(spread(y, mesh, placements), **actual, reduction="mean", **options)
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
            sharded = spread(y, *one_dimension(placement)).requires_grad_()
            expected, actual = loss(leaf, t, **options), loss(sharded, t, **options)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.to_local(), expected)
            expected.backward()
            actual.backward()
            grad: Any = sharded.grad
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.full_tensor(), leaf.grad)


@case()
def a_shard_of_no_classes() -> None:
    """Where it is one, the way back goes through the same collectives."""
    for loss, options in FORMS.values():
        for classes in (1, 3):
            for is_index in (False, True):
                y = torch.rand(4, classes, dtype=torch.float64).softmax(1)
                t = torch.randint(classes, (4,)) if is_index else y.flip(0)
                mesh, placements = one_dimension(Shard(1))
                weight = (
                    {} if loss is sum_squared_error else {"weight": torch.rand(classes).double()}
                )
                leaf, sharded = y.clone().requires_grad_(), spread(y, mesh, placements)
                sharded.requires_grad_()
                expected = loss(leaf, t, reduction="mean", **options, **weight)
                expected.backward()
                actual = loss(sharded, t, reduction="mean", **options, **weight)
                actual.backward()
                close(actual, expected.detach(), mesh, [Replicate()])
                close(sharded.grad, leaf.grad, mesh, placements)


@case()
def a_sum_that_is_still_to_be_made() -> None:
    mesh, _ = one_dimension(None)
    x, t = torch.rand(4, 5).double(), torch.randint(5, (4,))
    for loss, options in FORMS.values():
        share = DTensor.from_local(x / mesh.size(), mesh, [Partial()])
        torch.testing.assert_close(loss(share, t, **options).to_local(), loss(x, t, **options))


@case()
def uneven_shards_that_are_the_batches_of_their_processes() -> None:
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
def what_does_not_fit_is_an_error() -> None:
    world = dist.get_world_size()
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(8, 9).softmax(1), torch.randint(9, (8,))
    sharded = spread(y, mesh, by_class)
    for loss, options in FORMS.values():
        with raised(ValueError, "input: got Tensor", "expected a DTensor"):
            loss(y, spread(t, mesh, [Replicate()]), **options)
        with raised(ValueError, "target: got placements", "Shard", "expected", "Replicate"):
            loss(sharded, spread(t, mesh, [Shard(0)]), **options)
        with raised(ValueError, "target: got placements", "expected"):
            loss(sharded, spread(y, mesh, [Shard(0)]), **options)
        with raised(ValueError, "sample_weight: got placements", "expected"):
            loss(sharded, t, sample_weight=spread(torch.rand(8), mesh, [Shard(0)]), **options)
        with raised(ValueError, r"target: got shape \(4,\) for an input of shape \(8, 9\)"):
            loss(sharded, t[:4], **options)
        other = DeviceMesh("cpu", list(reversed(range(world))))
        with raised(ValueError, "target: got DeviceMesh", "expected DeviceMesh"):
            loss(sharded, spread(t, other, [Replicate()]), **options)
    # The shards are not those that DTensor makes of nine classes.
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
def a_bad_class_is_an_error_where_it_is() -> None:
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(8, 9).softmax(1), torch.arange(8)
    t[5] = 9
    for loss, options in FORMS.values():
        for placement in (Shard(1), Replicate()):
            message = r"target: got class 9 at position \(5,\)"
            with raised(IndexError, message) as caught:
                loss(spread(y, mesh, [placement]), t, **options)
            assert "shard" in caught.value.__notes__[0]
        t[5] = -100
        ignored = loss(spread(y, mesh, by_class), t, **options).to_local()
        torch.testing.assert_close(ignored, loss(y, t, **options))
        t[5] = 9
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        raised(ValueError, "input: got 2 at position", "from_logits=True"),
    ):
        y = torch.full((8, 8), 2.0)  # So every process has one.
        cross_entropy_error(spread(y, mesh, by_class), torch.zeros(8, dtype=torch.int64))


@case()
def a_bad_class_that_nobody_looked_at_is_nan() -> None:
    mesh, by_class = one_dimension(Shard(1))
    y, t = torch.rand(3, 9).softmax(1), torch.tensor([0, 9, -100])
    for loss, options in FORMS.values():
        sharded = spread(y, mesh, by_class).requires_grad_()
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
            y = spread(torch.rand(4, 5), mesh, placements).requires_grad_()
            value = loss(y, torch.arange(4), **options)
            with raised(NotImplementedError, "create_graph"):
                torch.autograd.grad(value, y, create_graph=True)


@case(Shard(0), Shard(1), worlds=(2,))
def compiled(placement: Any) -> None:
    """All losses in one graph, since each takes seconds; of whole shards.

    Of an uneven one, torch's own compiler lays the gradient out anew.
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
        spread(tensor, mesh, p).requires_grad_()
        for tensor, p in ((y, placements), (x, by_row), (w, by_class))
    ]
    torch._dynamo.reset()
    function = torch.compile(losses, fullgraph=True, backend="aot_eager")
    soft, index = spread(y.flip(0), mesh, placements), spread(t, mesh, by_row)
    actual = function(own[0], soft, index, *own[1:])
    for value, other in zip(actual, expected, strict=True):
        close(value, other.detach(), mesh, [Replicate()])
    sum(value * factor for value, factor in zip(actual, factors.tolist(), strict=True)).backward()
    for leaf, tensor in zip(own, leaves, strict=True):
        close(leaf.grad, tensor.grad, mesh, leaf.placements)


def under_way(tensor: Tensor) -> Tensor:
    """The tensor, as a layer that is cut by row puts it out: what adds it up is not waited for."""
    mesh = meshes()[0]
    share = tensor if tensor.is_floating_point() else tensor * (dist.get_rank() == 0)
    if tensor.is_floating_point():
        share = tensor / mesh.size()
    made = DTensor.from_local(share, mesh, [Partial()], run_check=False)
    local = made.redistribute(placements=[Replicate()], async_op=True).to_local()
    assert type(local) is AsyncCollectiveTensor
    return local


LOSSES: dict[str, tuple[Any, dict[str, Any]]] = FORMS | {
    "linear": (
        lambda x, t, **options: linear_cross_entropy_error(x, torch.eye(5).double(), t, **options),
        {},
    )
}


@case(*LOSSES, worlds=(2,))
def what_a_collective_is_under_way_to(form: str) -> None:
    """It takes the kernels, as a plain tensor does, and the linear loss its chunks."""
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
            actual = loss(under_way(other), under_way(t), sample_weight=under_way(weights), **named)
            assert type(actual) is Tensor
            torch.testing.assert_close(actual, expected)
            actual.backward(upstream)
            with torch.no_grad():
                torch.testing.assert_close(loss(under_way(y), t, **named), loss(y, t, **named))
        # Each process has a share of the sum, and its gradient is that of the whole.
        grad: Any = other.grad
        torch.testing.assert_close(grad * dist.get_world_size(), leaf.grad)
        tensor, target = under_way(other), under_way(t)
        value = loss(tensor, target, **named)
        with torch.no_grad():
            target.zero_()
        torch.testing.assert_close(
            torch.autograd.grad(value, tensor, upstream, retain_graph=True),
            torch.autograd.grad(loss(leaf, t, **named), leaf, upstream),
        )
        tensor = under_way(y).detach().requires_grad_()
        value = loss(tensor, t, **named)
        with torch.no_grad():
            tensor.zero_()
        with raised(RuntimeError, "modified by an inplace operation"):
            value.backward(upstream)
        (first,) = torch.autograd.grad(loss(leaf, t, **named).sum(), leaf, create_graph=True)
        tensor = under_way(other)
        (second,) = torch.autograd.grad(loss(tensor, t, **named).sum(), tensor, create_graph=True)
        torch.testing.assert_close(
            torch.autograd.grad(second.square().sum(), tensor, allow_unused=True),
            torch.autograd.grad(first.square().sum(), leaf, allow_unused=True),
        )
    made = DTensor.from_local(y / 2, meshes()[0], [Partial()], run_check=False)
    made = made.redistribute(placements=[Replicate()], async_op=True)
    if form != "linear":
        with mock.patch.object(formulas, "compute", side_effect=AssertionError("formula")):
            torch.testing.assert_close(loss(made, t, **options).to_local(), loss(y, t, **options))


@case(worlds=(2,))
def what_a_collective_is_under_way_to_in_a_graph() -> None:
    """It goes to the operator if a plain tensor does."""
    x, w, t = torch.rand(8, 5).double(), torch.rand(7, 5).double(), torch.randint(7, (8,))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    for input in (x, under_way(x)):
        torch._dynamo.reset()
        function = torch.compile(linear_cross_entropy_error, fullgraph=True, backend=backend)
        torch.testing.assert_close(function(input, w, t), linear_cross_entropy_error(x, w, t))
    with_operator = ["ops.torchlosses" in graph for graph in graphs]
    assert with_operator in ([True, True], [False, False])


# First compiled: after an embedding of such DTensors in eager mode torch does not trace one.
@case("compiled", "eager", worlds=(2,))
def hidden_states_of_an_embedding_that_is_cut(mode: str) -> None:
    """They are a sum that is still to be made, of a placement that is private."""
    mesh = meshes()[0]
    words, w, b = torch.randn(8, 4).double(), torch.randn(8, 4).double(), torch.randn(8).double()
    ids, t, soft = torch.arange(8).flip(0), torch.randint(8, (8,)), torch.rand(8, 8).double()

    def losses(words: Tensor, w: Tensor, b: Tensor, ids: Tensor, *targets: Tensor) -> list[Any]:
        made = [  # Embedded anew for each: torch itself reads such a sum once.
            linear_cross_entropy_error(
                F.embedding(ids, words), weight, target, linear_bias=b, reduction="mean"
            )
            for target in targets
            for weight in (w, words)  # Tied, too.
        ]
        if mode == "compiled":
            return made
        return [*made, cross_entropy_error(F.embedding(ids, words), t % 4, from_logits=True)]

    leaves = [tensor.clone().requires_grad_() for tensor in (words, w, b)]
    own: list[Any] = [spread(tensor, mesh, [Shard(0)]).requires_grad_() for tensor in (words, w, b)]
    everywhere: Any = spread(ids, mesh, [Replicate()])
    targets = [(t, spread(t, mesh, [Replicate()]))]
    function: Any = losses
    if mode == "compiled":
        torch._dynamo.reset()
        function = torch.compile(losses, fullgraph=True, backend="aot_eager")
    else:
        targets.append((soft, spread(soft, mesh, [Shard(1)])))
        hidden: Any = F.embedding(everywhere, own[0])
        assert type(hidden.placements[0]).__name__ == "_MaskPartial"
    expected = losses(*leaves, ids, *(whole for whole, _ in targets))
    with chunks_of(3):
        actual = function(*own, everywhere, *(part for _, part in targets))
    for value, other in zip(actual, expected, strict=True):
        close(value, other.detach(), mesh, [Replicate()])
    sum(expected).backward()
    sum(actual).backward()
    for leaf, tensor in zip(own, leaves, strict=True):
        close(leaf.grad, tensor.grad, mesh, [Shard(0)])


def flattens_over_time() -> bool:
    """Whether torch itself does, where the second of two dimensions is cut."""
    if torch.__version__ >= "2.14":
        return True
    try:
        spread(torch.ones(2, 2), meshes()[0], [Shard(1)]).flatten()
    except RuntimeError:
        return False
    return True


@case("eager")
@case("compiled", worlds=(2,))
def logits_cut_over_time_and_flattened(mode: str) -> None:
    if not flattens_over_time():
        return
    if mode == "compiled" and torch.__version__ < "2.13":
        return  # torch 2.12 compiles no flattened DTensor, with or without a loss.

    # A graph takes longer the more there is in it, and two processes suffice for the rest.
    few = mode == "compiled" or dist.get_world_size() > 2
    forms = {"smooth": FORMS["smooth"]} if few else FORMS
    reductions = ("mean",) if mode == "compiled" else ("none", "mean")

    def losses(y: Tensor, soft: Tensor, t: Tensor, w: Tensor, x: Tensor, v: Tensor) -> list[Any]:
        y, soft, t, w, x = (tensor.flatten(0, 1) for tensor in (y, soft, t, w, x))
        made = [
            loss(
                y, target, reduction=reduction, **options,
                sample_weight=w[:, None] if target is soft and form == "squares" else w,
            )
            for form, (loss, options) in forms.items()
            for target in ((soft, t) if few else (soft, t, whole.flatten()))
            for reduction in reductions
        ]  # fmt: skip
        return [*made, linear_cross_entropy_error(x, v, t, reduction="mean")]

    for mesh in meshes():
        ways = [[Shard(1)]] if mesh.ndim == 1 else [[Shard(0), Shard(1)], [Shard(2), Shard(1)]]
        # Of an uneven shard, torch's own compiler lays the gradient out anew.
        times = 7 if mesh.ndim == 1 and mode == "eager" else 6
        y = torch.rand(4, times, 6).double().softmax(2)
        whole, w = torch.randint(6, (4, times)), torch.rand(4, times).double()
        x, v = torch.rand(4, times, 3).double(), torch.rand(6, 3).double()
        tensors = (y, y.flip(0), whole, w, x, v)
        leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in tensors]
        expected = losses(*leaves)
        sum(value.sum() for value in expected).backward()
        for placements in ways:
            rows = beside(placements, [0, 1])
            by_class = [Shard(0) if p == Shard(2) else Replicate() for p in placements]
            own: list[Any] = [
                spread(tensor, mesh, p).requires_grad_(tensor.is_floating_point())
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
def pixels_cut_over_the_width_and_flattened() -> None:
    """Classes come before the dimension that is flattened, so that a target has it elsewhere."""
    if not flattens_over_time():
        return
    mesh = meshes()[0]
    y, t = torch.rand(2, 3, 4, 6).double().softmax(1), torch.randint(3, (2, 4, 6))
    for (loss, options), is_index in itertools.product(FORMS.values(), (False, True)):
        leaf, own = y.clone().requires_grad_(), spread(y, mesh, [Shard(3)]).requires_grad_()
        target = t if is_index else y.flip(0)
        named = options | {"reduction": "none"}
        expected = loss(leaf.flatten(2), target.flatten(-2), **named)
        cut = spread(target, mesh, [Shard(target.dim() - 1)])
        actual = loss(own.flatten(2), cut.flatten(-2), **named)
        torch.testing.assert_close(actual.full_tensor(), expected)
        upstream = torch.rand_like(expected)
        expected.backward(upstream)
        actual.backward(spread(upstream, mesh, actual.placements))
        close(own.grad, leaf.grad, mesh, [Shard(3)])
    classes = spread(y, mesh, [Shard(3)]).flatten(2).transpose(1, 2)
    with raised(ValueError, "input: got placements", "_StridedShard where it does not cut classes"):
        cross_entropy_error(classes, t.flatten(1)[:, :3] * 0, from_logits=True, dim=1)


@functools.cache
def half() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size() // 2)))


@case()
def a_process_outside_of_the_mesh_has_nothing() -> None:
    """As in all operations of torch; within it the loss is what it is."""
    mesh = half()
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
        leaf, own = y.clone().requires_grad_(), spread(y, mesh, [placement]).requires_grad_()
        expected, actual = (loss(v, t, reduction=reduction, **options) for v in (leaf, own))
        dims = [0, 1] if loss is sum_squared_error else [0]
        lost = beside([placement], dims) if reduction == "none" else [Replicate()]
        check(actual, expected.detach(), lost)
        expected.sum().backward()
        actual.sum().backward()
        check(own.grad, leaf.grad, [placement])
    x, w, t = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.randint(4, (6,))
    own = spread(x, mesh, [Replicate()]).requires_grad_()
    layer = spread(w, mesh, [Shard(0)]).requires_grad_()
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
    x, w = spread(y, mesh, placements), spread(torch.rand(5, 5), mesh, [Replicate()])
    for loss, options in LOSSES.values():
        if loss is not LOSSES["linear"][0]:
            for target in (t, spread(t, mesh, placements)):
                for transform in (torch.func.grad, torch.func.jacrev):
                    with raised(NotImplementedError, "torch.func: got a transform"):
                        transform(functools.partial(loss, target=target, **options))(x)
            of_weight = functools.partial(loss, x, t, **options)
            with raised(NotImplementedError, "torch.func: got a transform"):
                torch.func.grad(lambda s, loss=of_weight: loss(sample_weight=s))(torch.rand(8))
    for position in (0, 1):
        with raised(NotImplementedError, "torch.func: got a transform"):
            torch.func.grad(linear_cross_entropy_error, argnums=position)(x, w, t)


def test_what_is_private_to_torch_is_there() -> None:
    """Without these names a loss would not know what it is given, and nobody would notice."""
    assert issubclass(placement_types._StridedShard, placement_types.Placement)
    assert callable(AsyncCollectiveTensor.wait)
    tensor = torch.ones(2)

    def unwrap(x: Tensor) -> Tensor:
        assert x is not tensor
        assert sharded._unwrapped(x) is tensor
        return x

    torch.vmap(unwrap)(tensor)


def sizes() -> list[int]:
    """How many of ten samples each process has; of four, one has none."""
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
    """What the reduction divides by, of the samples of this process."""
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


def train(model: nn.Module, criterion: Any, is_index: bool, is_spread: bool) -> None:
    """SGD on a whole batch, or on a part of it with the recipe of the README."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    reduction = criterion.reduction
    for x, t in batches(is_index):
        if is_spread:
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


def parallel(kind: str) -> nn.Module:
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
        expected, model = network(), parallel(kind)
        train(expected, criterion, is_index, is_spread=False)
        train(model, criterion, is_index, is_spread=True)
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(whole.data, other.data, rtol=1e-10, atol=1e-12)


@case()
def a_mean_of_means_is_another() -> None:
    """Which is why there is a recipe."""
    x, t = next(batches(True))
    y, target = (tensor.split(sizes())[dist.get_rank()] for tensor in (x, t))
    mean = CrossEntropyError(from_logits=True, reduction="mean")(y, target)
    dist.all_reduce(mean)
    expected = CrossEntropyError(from_logits=True, reduction="mean")(x, t)
    assert (mean / dist.get_world_size() - expected).abs() > 1e-3


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Chunks of at most so many rows of float64."""
    with mock.patch.object(linear, "CHUNK", 8 * rows):
        yield


def layer_by(mesh: DeviceMesh) -> list[tuple[Any, Any]]:
    """How input and weight of a linear layer lie on a mesh."""
    if mesh.ndim == 1:
        return [([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()])]
    return [([Shard(0), Replicate()], [Replicate(), Shard(0)])]


@case(*REDUCTIONS)
def a_linear_layer_cut_by_class_or_by_row(reduction: Any) -> None:
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
        for by_row, by_class in layer_by(mesh):
            own: list[Any] = [
                spread(tensor, mesh, placements).requires_grad_()
                for tensor, placements in ((x, by_row), (w, by_class), (b, by_class))
            ]
            if "sample_weight" in options:
                named["sample_weight"] = spread(weights["sample_weight"], mesh, by_row)
            with chunks_of(9):
                loss: Any = linear_cross_entropy_error(
                    own[0], own[1], spread(target, mesh, beside_layer(by_row, by_class, target)),
                    linear_bias=own[2], **named,
                )  # fmt: skip
                placements = by_row if reduction == "none" else [Replicate()] * mesh.ndim
                close(loss, expected.detach(), mesh, placements)
                loss.backward(spread(upstream, mesh, placements))
            for leaf, tensor in zip(own, leaves, strict=True):
                close(leaf.grad, tensor.grad, mesh, leaf.placements)


def beside_layer(by_row: Any, by_class: Any, target: Tensor) -> list[Any]:
    """How targets lie beside it: soft ones have classes too."""
    cut = [Shard(2) if q.is_shard() else p for p, q in zip(by_row, by_class, strict=True)]
    return cut if target.dim() == 3 else list(by_row)


@case()
def only_numbers_per_row_and_the_gradient_of_the_input_travel() -> None:
    rows, width, classes = 12, 4, 101
    mesh = meshes()[0]
    x = spread(torch.randn(rows, width), mesh, [Replicate()]).requires_grad_()
    w = spread(torch.randn(classes, width), mesh, [Shard(0)]).requires_grad_()
    with CommDebugMode() as collectives, Traffic() as traffic, chunks_of(3):
        linear_cross_entropy_error(x, w, torch.randint(classes, (rows,))).backward()
    # Of each chunk the maximum and the sum, which backward makes again, and the sum's gradient.
    step = 6  # In float32.
    expected = [step * 4] * (rows // step * 5) + [4, rows * width * 4]
    assert sorted(traffic.sizes) == sorted(expected)
    counts = collectives.get_comm_counts()
    assert {str(op).rpartition(".")[2] for op, n in counts.items() if n} == {"all_reduce"}


@case(worlds=(2,))
def a_linear_layer_in_half_precision_sums_in_float32() -> None:
    mesh = meshes()[0]
    x, w = torch.rand(4096, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    t = torch.zeros(4096, dtype=torch.int64)
    leaf = w.double().requires_grad_()
    cross_entropy_error(x.double() @ leaf.T, t, from_logits=True).backward()
    own: Any = spread(w, mesh, [Shard(0)]).requires_grad_()
    with chunks_of(8):
        linear_cross_entropy_error(spread(x, mesh, [Replicate()]), own, t).backward()
    exact: Any = leaf.grad
    error = own.grad.full_tensor() - exact
    assert error.abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@case(*REDUCTIONS, worlds=(2,))
def what_changes_before_backward_is_an_error(reduction: Any) -> None:
    mesh = meshes()[0]
    for by_row, by_class in (([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()])):
        for name in ("input", "linear_weight", "linear_bias"):
            arguments: dict[str, Any] = {
                "input": spread(torch.randn(8, 4), mesh, by_row).requires_grad_(),
                "linear_weight": spread(torch.randn(12, 4), mesh, by_class).requires_grad_(),
                "linear_bias": spread(torch.randn(12), mesh, by_class).requires_grad_(),
            }
            leaves = tuple(arguments.values())
            target = spread(torch.randint(12, (8,)), mesh, by_row)
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
def a_linear_layer_in_a_model_that_frees_it_between(reduction: Any) -> None:
    def model() -> Layered:
        torch.manual_seed(0)
        return Layered(reduction)

    x, t = torch.randn(8, 4).double(), torch.randint(9, (8,))
    alone, together, world = model(), model(), dist.get_world_size()
    fully_shard(together.criterion, reshard_after_forward=True)
    fully_shard(together)
    alone(x, t).sum().backward()
    with chunks_of(1):
        loss = together(*(tensor.chunk(world)[dist.get_rank()] for tensor in (x, t))).sum()
        for _ in range(2):
            together.zero_grad()
            (loss * (world if reduction == "none" else 1)).backward(retain_graph=True)
    for parameter, other in zip(together.parameters(), alone.parameters(), strict=True):
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor(), other.grad)


class Layered(nn.Module):
    def __init__(self, reduction: Any) -> None:
        super().__init__()
        own: Any = {"dtype": torch.float64}
        self.body = nn.Linear(4, 4, **own)
        self.criterion = LinearCrossEntropyError(4, 9, bias=True, reduction=reduction, **own)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.criterion(self.body(x), t)


@case("ddp", "fsdp")
def a_linear_layer_in_a_module(kind: str) -> None:
    def model() -> LinearCrossEntropyError:
        torch.manual_seed(0)
        return LinearCrossEntropyError(4, 9, bias=True, dtype=torch.float64)

    x, t = torch.randn(8, 4).double(), torch.randint(9, (8,))
    alone: nn.Module = model()
    alone(x, t).backward()
    together: nn.Module = model()
    if kind == "ddp":
        together = DistributedDataParallel(together)
    else:
        fully_shard(together)
    world = dist.get_world_size()
    own = [tensor.chunk(world)[dist.get_rank()] for tensor in (x, t)]
    with chunks_of(1):
        (together(*own) * world).backward()
    for parameter, other in zip(together.parameters(), alone.parameters(), strict=True):
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor() if kind == "fsdp" else grad, other.grad)


@case()
def a_linear_layer_that_is_cut_alone_puts_itself_together() -> None:
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
def a_linear_layer_that_is_not_served_is_an_error() -> None:
    mesh = meshes()[0]
    x, w, t = torch.randn(8, 4), torch.randn(8, 4), torch.randint(8, (8,))
    by_class = spread(w, mesh, [Shard(0)])
    everywhere = spread(x, mesh, [Replicate()])
    with raised(ValueError, "input: got a plain tensor beside a DTensor", "fully_shard"):
        linear_cross_entropy_error(x, by_class, t)
    with raised(ValueError, "linear_weight: got a plain tensor"):
        linear_cross_entropy_error(everywhere, w, t)
    with raised(ValueError, "linear_weight: got placements", "expected", r"Shard\(0\)"):
        linear_cross_entropy_error(everywhere, spread(w, mesh, [Shard(1)]), t)
    for placement in (Shard(0), Shard(1)):
        with raised(ValueError, "input: got placements", "expected Replicate"):
            linear_cross_entropy_error(spread(x, mesh, [placement]), by_class, t)
    other = DeviceMesh("cpu", list(reversed(range(dist.get_world_size()))))
    with raised(ValueError, "input: got DeviceMesh", "expected DeviceMesh"):
        linear_cross_entropy_error(spread(x, other, [Replicate()]), by_class, t)
    with raised(ValueError, "linear_bias: got DeviceMesh", "expected DeviceMesh"):
        bias = spread(w[:, 0], other, [Replicate()])
        linear_cross_entropy_error(everywhere, by_class, t, linear_bias=bias)
    soft = spread(torch.ones(8, 8), mesh, [Shard(0)])
    by_row = (spread(x, mesh, [Shard(0)]), spread(w, mesh, [Replicate()]))
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match=r"target: the row at position \(0,\)"),
    ):
        linear_cross_entropy_error(*by_row, soft)
    loss = linear_cross_entropy_error(everywhere.requires_grad_(), by_class, t)
    with raised(NotImplementedError, "create_graph"):
        torch.autograd.grad(loss, everywhere, create_graph=True)
