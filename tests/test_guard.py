"""The pictures of examples/guard.py show what the README says about them."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra 'example' is not installed")
pytest.importorskip("sklearn", reason="the extra 'example' is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import guard


def test_training_breaks_only_without_the_guard() -> None:
    runs = {form: guard.train_form(form, seed=0, steps=40) for form in guard.FORMS}
    broken = runs[guard.NO_GUARD]
    assert len(broken) < 40
    assert broken[-1].loss == math.inf
    assert broken[-1].least_probability == 0
    assert broken[-1].test_accuracy < 0.2  # The weights are NaN.
    for form in (guard.CLIP, guard.GUARD, guard.LOGITS):
        assert len(runs[form]) == 40
        assert all(math.isfinite(step.loss) for step in runs[form])
    assert min(step.least_probability for step in runs[guard.CLIP]) < guard.DELTA


@pytest.mark.parametrize("name", guard.BEHIND_SOFTMAX)
def test_drawn_formulas_equal_autograd(name: str) -> None:
    criterion, formula, _, _ = guard.BEHIND_SOFTMAX[name]
    p = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(guard.autograd_slope(criterion, p), formula(p))


def test_script_writes_three_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SEEDS", range(1))
    guard.main(["--output-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"guard.png", "breaks.png", "learns.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
