"""A fresh process imports the package with nothing but torch and NumPy, quickly."""

import subprocess
import sys

EXTRAS = ("triton", "lightning", "pytorch_lightning", "torchvision", "torchmetrics", "matplotlib",
          "sklearn", "jsonargparse")  # fmt: skip


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_needs_no_extra() -> None:
    run(f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
import torch
from torchlosses import CrossEntropyError, SumSquaredError
y = torch.rand(4, 5, requires_grad=True)
(SumSquaredError()(y, torch.arange(4)) + CrossEntropyError()(y, torch.arange(4))).backward()
from torchlosses.functional import linear_cross_entropy_error
loss = torch.compile(linear_cross_entropy_error, fullgraph=True, backend="eager")
loss(y, torch.rand(3, 5), torch.zeros(4, dtype=torch.int64)).backward()
""")


def test_loads_little_beside_torch() -> None:
    """In milliseconds: what is imported after torch, and torch itself."""
    out = run("""
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import torchlosses
print(middle - start, time.perf_counter() - middle)
""")
    torch_seconds, own_seconds = map(float, out.split())
    assert own_seconds < torch_seconds / 4


def test_checks_stand_without_assertions() -> None:
    run(
        """
import torch
from torchlosses import SumSquaredError
try:
    SumSquaredError()(torch.rand(3, 1), torch.rand(3))
except TypeError as error:
    assert "unsqueeze" in str(error)
else:
    raise SystemExit("no error")
""",
        "-O",
    )
