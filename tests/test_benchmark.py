"""The benchmark runs, and the losses allocate their gradient and at most 1 MB."""

import csv
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib", reason="the extra 'example' is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import benchmark


def test_benchmark_measures_every_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes half a minute, so this test leaves it out, as if no compiler were installed.
    def no_compiler(loss: benchmark.Loss) -> benchmark.Loss:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    module, function = benchmark.PEERS["liger"]
    liger = types.SimpleNamespace(**{function: F.cross_entropy})
    monkeypatch.setitem(sys.modules, module, liger)
    monkeypatch.setitem(sys.modules, benchmark.PEERS["quack"][0], None)
    few = ["--rounds=1", "--malloc=default", "--dtypes", "float32", "bfloat16"]
    benchmark.main(["--shapes", "4x3", "2x3x2", *few, f"--output-dir={tmp_path}"])
    output = capsys.readouterr().out
    assert "left out: compiled (no compiler)" in output
    with (tmp_path / "default.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(benchmark.WORKLOADS) * len(benchmark.STEPS)
    for row in rows:
        assert row["compiled"] == ""
        assert all(float(row[name]) > 0 for name in ("torchlosses", "torch", "eager", "copy"))
        assert bool(row["liger"]) == (row["workload"] == "logits, index" and row["shape"] == "4x3")
        assert row["quack"] == ""
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_benchmark_runs_with_both_settings_of_malloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    arguments = ["--shapes=4x3", "--dtypes=float32", "--workloads=squares, dense", "--rounds=1"]
    benchmark.main([*arguments, f"--output-dir={tmp_path}"])
    rows = benchmark.read(tmp_path / "benchmark.csv")
    settings = [setting for setting in benchmark.MALLOC for _ in benchmark.STEPS]
    assert [row["malloc"] for row in rows] == settings
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_benchmark_measures_the_linear_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--linear", "--rounds=1", "--malloc=default", f"--output-dir={tmp_path}"]
    benchmark.main([*few, "--shapes=64x8x100", "--dtypes=float32"])
    rows = benchmark.read(tmp_path / "linear-default.csv")
    assert [row["workload"] for row in rows] == list(benchmark.LINEAR_WORKLOADS)
    for row in rows:
        assert min(row[name] for name in ("torchlosses", "plain", "torchlosses MB", "plain MB")) > 0
    assert "half ignored" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2048, 4096), (8, 16, 256, 256)], ids=str)
@pytest.mark.parametrize("workload", benchmark.WORKLOADS)
def test_losses_allocate_their_gradient_and_at_most_1_mb(
    workload: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    input, target = benchmark.arguments(workload, shape, dtype, "cpu")
    for upstream, gradient in ((None, 0), (1.0, input.nbytes), (0.5, input.nbytes)):
        loss = benchmark.WORKLOADS[workload][0]
        call = benchmark.step(loss, input, target, upstream)
        call()
        assert benchmark.peak_memory(call, "cpu") <= gradient + 2**20
