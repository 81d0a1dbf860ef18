"""Modules in many calls, threads and worker processes, and pickled by other versions of torch."""

import contextlib
import copy
import gc
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchlosses import CrossEntropyError, LinearCrossEntropyError, SumSquaredError

# The number of calls in the tests of memory; CALLS=1000000 takes minutes.
CALLS = int(os.environ.get("CALLS", "2000"))
STATM = Path("/proc/self/statm")
PICKLES = sorted(Path(__file__).with_name("pickles").glob("torch-*.pkl"))


def criteria() -> list[nn.Module]:
    """The modules in the pickles, which `pickle.dump(criteria(), file)` wrote in other versions."""
    options: dict[str, Any] = {"reduction": "mean", "dim": -1, "ignore_index": 7}
    weight = torch.tensor([0.5, 1.0, 2.0])
    smooth = CrossEntropyError(
        weight=weight, delta=1e-3, from_logits=True, label_smoothing=0.25, **options
    )
    return [SumSquaredError(**options), smooth]


def value_and_grad(criterion: nn.Module, seed: int, rows: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(rows, 3, generator=generator).requires_grad_()
    loss = criterion(y, torch.arange(rows) % 3)
    loss.backward()
    assert y.grad is not None
    return loss.detach(), y.grad


def equal(results: Any, expected: Any) -> bool:
    return all(
        torch.equal(one, other)
        for pair, pair_of_expected in zip(results, expected, strict=True)
        for one, other in zip(pair, pair_of_expected, strict=True)
    )


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def backward_twice(y: Tensor, t: Tensor, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_penalty(y: Tensor, t: Tensor, loss: Tensor) -> None:
    (grad,) = torch.autograd.grad(loss, y, create_graph=True)
    torch.autograd.grad(grad.square().sum(), y)


def no_backward(y: Tensor, t: Tensor, loss: Tensor) -> None: ...


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "use", [backward_twice, gradient_penalty, no_backward], ids=lambda use: use.__name__
)
@pytest.mark.parametrize(
    "criterion",
    [SumSquaredError(), CrossEntropyError(), CrossEntropyError(from_logits=True)],
    ids=["sse", "probabilities", "logits"],
)
def test_memory_does_not_grow(
    criterion: nn.Module, use: Callable[[Tensor, Tensor, Tensor], None], path: str
) -> None:
    gc.collect()
    gc.freeze()  # After a compilation, counting the objects of other tests takes seconds.
    y = torch.rand(256, 64, requires_grad=True)
    targets = torch.rand(256, 64), torch.arange(256) % 64

    def call(times: int) -> None:
        for number in range(times):
            use(y, targets[number % 2], criterion(y, targets[number % 2]))
        y.grad = None
        gc.collect()

    calls = max(CALLS // 18, 20)  # CALLS in all parametrizations together.
    call(calls // 4 + 20)
    growth = []
    for _ in range(3):  # The allocator may grow once, for earlier calls; a leak grows each time.
        bytes_before, objects_before = resident_bytes(), len(gc.get_objects())
        call(calls)
        assert len(gc.get_objects()) - objects_before < 20
        growth.append(resident_bytes() - bytes_before)
    # A leaked gradient of 64 kB per call would be more, even with the default CALLS.
    assert min(growth) < 2**22


def test_threads_share_one_module() -> None:
    """Transforms in two threads must not affect plain autograd in the others."""
    seeds, rows = range(4), 3000
    start = threading.Barrier(len(seeds) + 2)

    def plain(criterion: nn.Module, seed: int, expected: tuple[Tensor, Tensor]) -> None:
        start.wait()
        for _ in range(50):
            # While any thread computes tangents the formula serves, which rounds differently.
            torch.testing.assert_close(value_and_grad(criterion, seed, rows), expected)

    def per_sample(criterion: nn.Module, y: Tensor, t: Tensor) -> Any:
        start.wait()
        for _ in range(10):
            result = torch.vmap(torch.func.grad(criterion))(y, t)
        return result

    def forward(criterion: nn.Module, y: Tensor, t: Tensor) -> Any:
        start.wait()
        for _ in range(10):  # In one thread only: torch counts levels globally.
            result = torch.func.jvp(lambda y: criterion(y, t), (y,), (y,))[1]
        return result

    y, t = torch.rand(4, 5, 3), torch.arange(20).view(4, 5) % 3
    for criterion in criteria():
        expected = [value_and_grad(criterion, seed, rows) for seed in seeds]
        with ThreadPoolExecutor(len(seeds) + 2) as threads:
            grads = threads.submit(per_sample, criterion, y, t)
            tangent = threads.submit(forward, criterion, y[0], t[0])
            plains = [threads.submit(plain, criterion, seed, expected[seed]) for seed in seeds]
        for future in plains:
            future.result()
        torch.testing.assert_close((grads.result()[0] * y[0]).sum(), tangent.result())


class Losses(Dataset[tuple[Tensor, Tensor]]):
    """A data set that computes losses, as in a search for hard examples."""

    def __init__(self) -> None:
        self.criteria = criteria()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return value_and_grad(self.criteria[index // 8], index)


def use_workers(rank: int, method: str) -> None:
    losses = Losses()
    expected = [losses[index] for index in range(len(losses))]
    loader = DataLoader(
        losses, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60
    )
    with warnings.catch_warnings():
        # Python warns of every fork of a process with threads, and torch starts some.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        results = list(loader)
    assert equal(results, expected)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_losses_in_worker_processes(method: str) -> None:
    """In a new process: autograd cannot run in the fork of one that has used it on a GPU."""
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    torch.multiprocessing.spawn(use_workers, (method,))  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", PICKLES, ids=lambda file: file.stem)
def test_pickles_of_other_versions_of_torch(file: Path) -> None:
    unpickled = pickle.loads(file.read_bytes())
    for criterion, expected in zip(unpickled, criteria(), strict=True):
        assert repr(criterion) == repr(expected)
        assert equal([value_and_grad(criterion, 0)], [value_and_grad(expected, 0)])
        state = criterion.state_dict()
        assert str(state) == str(expected.state_dict())
        assert equal([value_and_grad(copy.deepcopy(criterion), 1)], [value_and_grad(expected, 1)])


def test_pickles_of_two_versions_exist() -> None:
    assert len(PICKLES) >= 2


def backward_from_read_only_memory(rank: int, folder: str) -> None:
    """With a hook that writes saved tensors to a disk and maps the files read-only."""

    def pack(tensor: Tensor) -> Tensor:
        file = Path(folder, str(len(os.listdir(folder))))
        array = tensor.detach().numpy()
        array.tofile(file)
        memory = np.memmap(file, array.dtype, "r", shape=array.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(memory)

    y, soft, index = torch.rand(4, 3), torch.rand(4, 3), torch.tensor([1, 0, 2, 1])
    layer = LinearCrossEntropyError(3, 3)
    for criterion in (*criteria(), CrossEntropyError(), layer):
        has_ignore_index = criterion.ignore_index != -100  # An error with a dense target.
        for target in (index,) if has_ignore_index else (soft, index):
            for factor in (1, 3):
                grads = []
                for hooks in (
                    contextlib.nullcontext(),
                    torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                ):
                    leaf = y.clone().requires_grad_()
                    with hooks:
                        loss = criterion(leaf, target)
                    (loss * factor).backward()
                    assert leaf.grad is not None
                    grads.append(leaf.grad.mul_(2))  # Gradient clipping writes to it too.
                torch.testing.assert_close(*grads)


def test_saved_tensors_in_read_only_memory(tmp_path: Path) -> None:
    """In a process of its own, since a write would end the process."""
    arguments = (backward_from_read_only_memory, (str(tmp_path),))
    torch.multiprocessing.spawn(*arguments)  # type: ignore[attr-defined]
