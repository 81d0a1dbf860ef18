"""Every test that takes a `device` runs on each one that is there, by formula and by kernels."""

import functools
import gc
import inspect
import os
from types import SimpleNamespace
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # Its processes share the cores, as torch must know early.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from torchlosses import checks, fused

DEVICES = ["cpu"]
if os.environ.get("TRITON_INTERPRET") == "1":  # test_triton.py has such a process.
    from triton.runtime import interpreter

    from torchlosses.kernels import triton

    def compute(
        call: Any, input: torch.Tensor, target: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        """Complains of a bad class, as the kernels of a CPU do."""
        if call.is_index:
            checks.check_classes(target, input.shape[call.dim], call.ignore_index)
        return triton.compute(call, input, target, *rest, **more)

    interpreted: Any = SimpleNamespace(compute=compute, rescale=triton.rescale)
    fused.KERNELS["cpu"] = lambda device: interpreted

    # With every call within a kernel the interpreter looks through Triton's whole language for what
    # it has replaced already, and spends four fifths of its time there.
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, _ in inspect.getmembers(package, is_builtin)]

    def replace(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if not is_builtin(member):
                break
            interpreter._patch_attr(package, name, member, builder, scope)

    private = (
        getattr(interpreter, "_patch_builtin", None),
        getattr(interpreter, "_patch_attr", None),
    )
    if all(private) and "scope" in inspect.signature(interpreter._patch_builtin).parameters:
        interpreter._patch_builtin = replace  # Other versions are as slow as they are.
elif torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}; devices under test: {', '.join(DEVICES)}"


# The files whose tests take longest, which start first, so that no process ends long after another.
LONGEST = ("triton", "distributed", "mnist", "export", "transforms", "benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # What is loaded stays, and is not looked through again with every collection.


@pytest.fixture(params=["formula", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way is taken wherever there is a choice."""
    if request.param == "formula":
        monkeypatch.setattr(fused, "KERNELS", {})
    return str(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, path: str) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _start_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "_failed", set())  # Of one test's kernels the next knows nothing.
