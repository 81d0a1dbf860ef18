"""The package imports quickly, in a fresh process that has only torch and NumPy."""

import ast
import subprocess
import sys
from pathlib import Path

import torchlosses

EXTRAS = ("triton", "lightning", "pytorch_lightning", "torchvision", "torchmetrics", "matplotlib",
          "sklearn", "jsonargparse")  # fmt: skip


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_works_without_the_extras() -> None:
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


def test_import_takes_under_a_quarter_of_the_time_of_torch() -> None:
    """The CPU kernels are imported with the first eager call: earlier, a mode could be active."""
    out = run("""
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import torchlosses
end = time.perf_counter()
print(middle - start, end - middle, "torchlosses.kernels.cpu" in sys.modules)
""")
    torch_seconds, own_seconds = map(float, out.split()[:2])
    assert out.endswith("False\n")
    assert own_seconds < torch_seconds / 4


def test_package_has_no_assertions() -> None:
    """Since `python -O` removes them."""
    files = list(Path(torchlosses.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.Assert) for node in nodes), file
