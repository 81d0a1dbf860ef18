"""Every test that takes a `device` runs on each one that is there, by formula and by kernels."""

import os

import pytest
import torch

from torchlosses import fused

DEVICES = ["cpu"]
if os.environ.get("TRITON_INTERPRET") == "1":  # test_triton.py has such a process.
    from torchlosses.kernels import triton

    fused.KERNELS["cpu"] = lambda device: triton
elif torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}; devices under test: {', '.join(DEVICES)}"


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
def _seed() -> None:
    torch.manual_seed(0)
