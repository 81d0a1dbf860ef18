"""Every test with a `device` runs on each available device, by the formula and by the kernels."""

import gc
import os
from types import SimpleNamespace
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # Workers share the cores; torch reads this at import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from paths import use_kernels

from torchlosses import checks, ops

DEVICES = ["cpu"]
if os.environ.get("TRITON_INTERPRET") == "1":  # test_triton.py starts such a process.
    from triton.runtime import interpreter

    from torchlosses.kernels import triton

    class CheckedPlan(triton.Plan):
        def compute(self, *arguments: Any) -> Any:
            """Raises IndexError for an invalid class, as the CPU kernels do."""
            input, target, *_ = arguments
            raise_on_invalid = arguments[7] if len(arguments) > 7 else True
            call = self.call
            if call.is_index and raise_on_invalid:
                checks.check_classes(target, input.shape[call.dim], call.ignore_index)
            return super().compute(*arguments)

    def prepare(*arguments: Any) -> CheckedPlan:
        triton.prepare(*arguments)  # It refuses unknown names.
        return CheckedPlan(*arguments)

    interpreted = SimpleNamespace(
        LOSSES=triton.LOSSES, CAN_FAIL=True, prepare=prepare, Plan=CheckedPlan
    )
    ops.KERNEL_LOADERS["cpu"] = lambda device: interpreted

    # For every call inside a kernel the interpreter patches the whole of `triton.language` again,
    # which takes most of its time. Patch once instead, in the versions that have a scope for it.
    if hasattr(interpreter, "_LangPatchScope"):
        patch_all = interpreter._patch_lang
        tl = interpreter.tl
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

        def patch_once(kernel: Any) -> Any:
            if tl.core.is_builtin(tl.core.load):
                return patch_all(language)
            return interpreter._LangPatchScope()  # Nothing to restore.

        interpreter._patch_lang = patch_once
elif torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}; devices under test: {', '.join(DEVICES)}"


# The slowest files start first, so that all workers finish at about the same time.
SLOWEST = ("triton", "distributed", "mnist", "export", "transforms", "benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": position for position, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # Garbage collections skip the modules that are loaded by now.


@pytest.fixture(params=["formula", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether losses are computed by the formula or, where a kernel serves, by the kernels."""
    if request.param == "formula":
        use_kernels(monkeypatch, {})
    return str(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, path: str) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _reset_state(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(ops, "_failed", set())  # A kernel that fails in one test serves the next.
