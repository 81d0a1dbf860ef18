"""One module in many calls, in threads, in worker processes and in another version of torch."""

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

# With CALLS=1000000 the test of memory is one of endurance, in minutes.
CALLS = int(os.environ.get("CALLS", "2000"))
RESIDENT = Path("/proc/self/statm")
PICKLES = sorted(Path(__file__).with_name("pickles").glob("torch-*.pkl"))


def criteria() -> list[nn.Module]:
    """Those of the pickles: `pickle.dump(criteria(), file)`, by the torch of the file's name."""
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


def same(results: Any, expected: Any) -> bool:
    return all(
        torch.equal(one, other)
        for pair, pair_of_expected in zip(results, expected, strict=True)
        for one, other in zip(pair, pair_of_expected, strict=True)
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def once_more(y: Tensor, t: Tensor, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def penalty(y: Tensor, t: Tensor, loss: Tensor) -> None:
    (grad,) = torch.autograd.grad(loss, y, create_graph=True)
    torch.autograd.grad(grad.square().sum(), y)


def dropped(y: Tensor, t: Tensor, loss: Tensor) -> None:
    """A loss that no one goes backward from."""


@pytest.mark.skipif(not RESIDENT.exists(), reason="the file is Linux's")
@pytest.mark.parametrize("use", [once_more, penalty, dropped], ids=lambda use: use.__name__)
@pytest.mark.parametrize(
    "criterion",
    [SumSquaredError(), CrossEntropyError(), CrossEntropyError(from_logits=True)],
    ids=["sse", "probabilities", "logits"],
)
def test_memory_is_flat(
    criterion: nn.Module, use: Callable[[Tensor, Tensor, Tensor], None], path: str
) -> None:
    gc.collect()
    gc.freeze()  # To count what other tests left takes seconds after a compilation.
    y = torch.rand(256, 64, requires_grad=True)
    targets = torch.rand(256, 64), torch.arange(256) % 64

    def call(times: int) -> None:
        for number in range(times):
            use(y, targets[number % 2], criterion(y, targets[number % 2]))
        y.grad = None
        gc.collect()

    calls = max(CALLS // 18, 20)  # All tests together.
    call(calls // 4 + 20)
    grown = []
    for _ in range(3):  # The allocator may grow once, for what came before; a leak goes on.
        bytes_before, objects_before = resident(), len(gc.get_objects())
        call(calls)
        assert len(gc.get_objects()) - objects_before < 20
        grown.append(resident() - bytes_before)
    # Less than a leak of one gradient or term, of 64 kB, in each of the fewest calls.
    assert min(grown) < 2**22


def test_threads_call_one_module_at_once() -> None:
    """Some in plain autograd, two in transforms, which the others must not see."""
    seeds, rows = range(4), 3000
    start = threading.Barrier(len(seeds) + 2)

    def plain(criterion: nn.Module, seed: int, expected: tuple[Tensor, Tensor]) -> None:
        start.wait()
        for _ in range(50):
            # While there is a tangent anywhere the formula serves, which rounds otherwise.
            torch.testing.assert_close(value_and_grad(criterion, seed, rows), expected)

    def per_sample(criterion: nn.Module, y: Tensor, t: Tensor) -> Any:
        start.wait()
        for _ in range(10):
            result = torch.vmap(torch.func.grad(criterion))(y, t)
        return result

    def forward(criterion: nn.Module, y: Tensor, t: Tensor) -> Any:
        start.wait()
        for _ in range(10):  # Not in two threads: torch's own count of levels is that of all.
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
    """What a worker that looks for hard examples does."""

    def __init__(self) -> None:
        self.criteria = criteria()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return value_and_grad(self.criteria[index // 8], index)


def use_workers(rank: int, method: str) -> None:
    here = Losses()
    expected = [here[index] for index in range(len(here))]
    there = DataLoader(
        here, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60
    )
    with warnings.catch_warnings():
        # Python says so of every fork of a process with threads, and torch has some.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        results = list(there)
    assert same(results, expected)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    """From a new process: one that has gone backward on another device cannot do so in a fork."""
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    torch.multiprocessing.spawn(use_workers, (method,))  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", PICKLES, ids=lambda file: file.stem)
def test_pickles_of_other_versions_of_torch(file: Path) -> None:
    unpickled = pickle.loads(file.read_bytes())
    for criterion, made_here in zip(unpickled, criteria(), strict=True):
        assert repr(criterion) == repr(made_here)
        assert same([value_and_grad(criterion, 0)], [value_and_grad(made_here, 0)])
        state = criterion.state_dict()
        assert str(state) == str(made_here.state_dict())
        assert same([value_and_grad(copy.deepcopy(criterion), 1)], [value_and_grad(made_here, 1)])


def test_there_are_pickles_of_two_versions() -> None:
    assert len(PICKLES) >= 2


def go_backward_from_read_only_memory(rank: int, folder: str) -> None:
    """As a hook leaves it that spills what is saved to a disk, and maps the file."""

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
        is_set = criterion.ignore_index != -100  # Which a dense target refuses.
        for target in (index,) if is_set else (soft, index):
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
                    grads.append(leaf.grad.mul_(2))  # As clipping does.
                torch.testing.assert_close(*grads)


def test_saved_tensors_in_read_only_memory(tmp_path: Path) -> None:
    """In a process of its own, which the system would end."""
    arguments = (go_backward_from_read_only_memory, (str(tmp_path),))
    torch.multiprocessing.spawn(*arguments)  # type: ignore[attr-defined]
