"""Every test that takes a `device` runs on each one that is there, by formula and by kernels."""

import gc
import os
from types import SimpleNamespace
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # Its processes share the cores, as torch must know early.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from paths import use_kernels

from torchlosses import checks, ops

DEVICES = ["cpu"]
if os.environ.get("TRITON_INTERPRET") == "1":  # test_triton.py has such a process.
    from triton.runtime import interpreter

    from torchlosses.kernels import triton

    class Complaining(triton.Launch):
        def compute(self, *arguments: Any) -> Any:
            """Complains of a bad class, as the kernels of a CPU do."""
            input, target, *_ = arguments
            raise_on_invalid = arguments[7] if len(arguments) > 7 else True
            call = self.call
            if call.is_index and raise_on_invalid:
                checks.check_classes(target, input.shape[call.dim], call.ignore_index)
            return super().compute(*arguments)

    interpreted = SimpleNamespace(
        LOSSES=triton.LOSSES, CAN_FAIL=True, prepare=Complaining, Launch=Complaining
    )
    ops.KERNELS["cpu"] = lambda device: interpreted

    # With every call within a kernel the interpreter replaces Triton's whole language again, and
    # spends most of its time there. Other versions than those with such a scope are as slow as
    # they are.
    if hasattr(interpreter, "_LangPatchScope"):
        replace_all = interpreter._patch_lang
        tl = interpreter.tl
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

        def replace_once(kernel: Any) -> Any:
            if tl.core.is_builtin(tl.core.load):
                return replace_all(language)
            return interpreter._LangPatchScope()  # Nothing to put back.

        interpreter._patch_lang = replace_once
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
        use_kernels(monkeypatch, {})
    return str(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, path: str) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _start_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(ops, "_failed", set())  # Of one test's kernels the next knows nothing.
