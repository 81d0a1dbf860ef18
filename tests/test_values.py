"""The losses and the NumPy reference agree with their definition, published and by hand."""

import importlib.util
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import torchlosses
from torchlosses import CrossEntropyError, SumSquaredError, functional, reference

# Rows of ten class probabilities, and their loss for class 2.
RIGHT = [0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0]
WRONG = [0.1, 0.05, 0.1, 0.0, 0.05, 0.1, 0.0, 0.6, 0.0, 0.0]
UNNORMALIZED = [0.2, 0.5, 0.1, 0.1, 0.05, 0.1, 0.0, 0.6, 0.0, 0.0]
VALUES: list[tuple[str, list[float], float]] = [
    ("sum_squared_error", RIGHT, 0.0975),
    ("sum_squared_error", WRONG, 0.5975),
    ("cross_entropy_error", RIGHT, 0.510825457099338),
    ("cross_entropy_error", WRONG, 2.302584092994546),
    ("cross_entropy_error", UNNORMALIZED, 2.302584092994546),
]
TARGETS = (np.array(2), np.eye(10)[2], np.eye(10, dtype=np.int64)[2], np.eye(10, dtype=bool)[2])


@pytest.mark.parametrize("target", TARGETS, ids=("index", "float", "int", "bool"))
@pytest.mark.parametrize(("name", "probabilities", "expected"), VALUES)
def test_published_values(
    name: str, probabilities: list[float], expected: float, target: Any, device: str
) -> None:
    input = torch.tensor(probabilities, dtype=torch.float64, device=device)
    loss = getattr(functional, name)(input, torch.tensor(target, device=device))
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    assert getattr(reference, name)(probabilities, target) == pytest.approx(
        expected, rel=0, abs=1e-12
    )


def test_default_reduction_is_sum_and_default_delta_is_1e_7() -> None:
    input = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = CrossEntropyError()(input, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(-math.log(1e-7) - math.log(1 + 1e-7), abs=1e-12)
    loss.backward()
    assert input.grad is not None
    assert input.grad.tolist() == [[0, pytest.approx(-1e7)], [0, pytest.approx(-1 / (1 + 1e-7))]]
    assert SumSquaredError()(input, torch.tensor([1, 1])).item() == 1.0


# By hand: two rows of three classes.
ROWS = [[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]]
LOG2 = math.log(2)
BY_HAND: list[tuple[str, Any, dict[str, Any], Any]] = [
    ("sum_squared_error", [0, 2], {}, (0.25 + 0.0625 * 2) / 2 + (0.015625 + 0.140625 + 0.25) / 2),
    ("sum_squared_error", [0, -100], {"reduction": "mean"}, (0.25 + 0.0625 * 2) / 2 / 3),
    ("sum_squared_error", [0, 2], {"reduction": "batchmean"}, (0.375 + 0.40625) / 4),
    ("sum_squared_error", [0, 2], {"sample_weight": [3, 1], "reduction": "mean"},
     (3 * 0.375 + 0.40625) / 2 / 12),
    ("cross_entropy_error", [0, 2], {"delta": 0, "reduction": "none"}, [LOG2, LOG2]),
    ("cross_entropy_error", [1, 0], {"delta": 0, "reduction": "none"}, [2 * LOG2, 3 * LOG2]),
    ("cross_entropy_error", [1, 0], {"delta": 0, "reduction": "mean"}, 2.5 * LOG2),
    ("cross_entropy_error", [1, 0], {"delta": 0, "reduction": "mean", "weight": [1, 3, 5]},
     (3 * 2 + 1 * 3) / 4 * LOG2),
    ("cross_entropy_error", [1, 0], {"delta": 0, "reduction": "mean", "sample_weight": [1, 3]},
     (2 + 3 * 3) / 4 * LOG2),
    ("cross_entropy_error", [1, -100], {"delta": 0, "reduction": "mean"}, 2 * LOG2),
    ("cross_entropy_error", [1, -100], {"delta": 0, "reduction": "batchmean"}, LOG2),
    ("cross_entropy_error", [1, 0], {"delta": 0.125, "reduction": "none"},
     [-math.log(0.375), 2 * LOG2]),
    ("cross_entropy_error", [[0.5, 0.5, 0], [1, 0, 0]], {"delta": 0, "reduction": "none"},
     [1.5 * LOG2, 3 * LOG2]),
    ("cross_entropy_error", [[0.5, 0.5, 0], [1, 0, 0]],
     {"delta": 0, "reduction": "mean", "weight": [1, 3, 5]}, (0.5 + 3 + 3) / 2 * LOG2),
    ("cross_entropy_error", [0, -100], {"delta": 0, "label_smoothing": 0.3},
     0.7 * LOG2 + 0.1 * (1 + 2 + 2) * LOG2),
    # softmax([0.5, 0.25, 0.25]) = [e^¼, 1, 1] / (e^¼ + 2)
    ("cross_entropy_error", [0, -100], {"delta": 0, "from_logits": True},
     math.log(math.exp(0.25) + 2) - 0.25),
    ("cross_entropy_error", [0, -100], {"delta": 0.5, "from_logits": True},
     -math.log(math.exp(0.25) / (math.exp(0.25) + 2) + 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "options", "expected"), BY_HAND)
def test_values_by_hand(
    name: str, target: Any, options: dict[str, Any], expected: Any, device: str
) -> None:
    assert getattr(reference, name)(ROWS, target, **options) == pytest.approx(expected, abs=1e-15)
    options = {
        key: torch.tensor(value, dtype=torch.float64, device=device)
        if isinstance(value, list)
        else value
        for key, value in options.items()
    }
    input = torch.tensor(ROWS, dtype=torch.float64, device=device)
    loss = getattr(functional, name)(input, torch.tensor(target, device=device), **options)
    assert loss.tolist() == pytest.approx(expected, abs=1e-14)


def test_mean_by_four_million_broadcast_weights(device: str) -> None:
    """Every weight counts for ten elements; rounding errors must not add up in their sum."""
    weight = torch.rand(4_000_000, 1, device=device)
    ones = torch.ones((), device=device).expand(4_000_000, 10)
    loss = functional.sum_squared_error(ones, ones * 0, reduction="mean", sample_weight=weight)
    assert loss.item() == pytest.approx(0.5, rel=1e-6)


def test_reference_gradients_by_hand() -> None:
    assert reference.sum_squared_error_grad(ROWS, [0, -100]).tolist() == [
        [-0.5, 0.25, 0.25],
        [0, 0, 0],
    ]
    grad = reference.cross_entropy_error_grad(ROWS, [0, 1], delta=0.125, reduction="mean")
    assert grad.tolist() == [[-0.5 / 0.625, 0, 0], [0, -1.0, 0]]
    # Two equal logits of three, the third at −∞: p = (½, ½, 0) and s = ½/(½+½) = ½.
    logits = [0.0, 0.0, -np.inf]
    grad = reference.cross_entropy_error_grad(logits, 0, delta=0.5, from_logits=True)
    assert grad.tolist() == [-0.25, 0.25, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("from_logits", [False, True])
def test_weights_of_absent_classes_and_ignored_samples_may_be_infinite_or_nan(
    bad: float, from_logits: bool, device: str
) -> None:
    y, target = np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]), [0, -100, 1]
    weight, sample_weight = np.array([1, 2, bad]), np.array([1, bad, 3])
    options: dict[str, Any] = {"reduction": "mean", "from_logits": from_logits}
    reference_options = options | {"weight": weight, "sample_weight": sample_weight}
    value = reference.cross_entropy_error(y, target, **reference_options)
    grad = reference.cross_entropy_error_grad(y, target, **reference_options)
    finite = options | {"weight": [1, 2, 5], "sample_weight": [1, 5, 3]}
    assert value == reference.cross_entropy_error(y, target, **finite)
    assert grad.tolist() == reference.cross_entropy_error_grad(y, target, **finite).tolist()

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(values, device=device)

    options |= {"weight": tensor(weight), "sample_weight": tensor(sample_weight)}
    input = tensor(y).requires_grad_()
    loss = functional.cross_entropy_error(input, tensor(target), **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(value))
    torch.testing.assert_close(input.grad, tensor(grad))
    squares = {"reduction": "mean", "sample_weight": sample_weight}
    value = reference.sum_squared_error(y, target, **squares)
    assert value == reference.sum_squared_error(y, target, **squares | {"sample_weight": [1, 5, 3]})
    options = {"reduction": "mean", "sample_weight": tensor(sample_weight)}
    loss = functional.sum_squared_error(input, tensor(target), **options)
    torch.testing.assert_close(loss.detach(), tensor(value))


def test_reference_needs_no_torch() -> None:
    spec = importlib.util.find_spec("torchlosses.reference")
    assert spec is not None
    assert spec.origin is not None
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, spec.origin], check=True)


def test_public_names() -> None:
    assert torchlosses.__all__ == [
        "CrossEntropyError",
        "LinearCrossEntropyError",
        "SumSquaredError",
        "functional",
        "reference",
    ]
    assert functional.__all__ == [
        "cross_entropy_error",
        "linear_cross_entropy_error",
        "sum_squared_error",
    ]


def test_squares_near_the_largest_number_of_the_dtype(device: str) -> None:
    """½ (y − t)² is finite where (y − t)² is not."""
    y = torch.tensor([2.4e19, -2.5e19], device=device)
    loss = functional.sum_squared_error(y, torch.zeros_like(y), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([2.88e38, 3.125e38], device=device))


def test_mean_is_finite_for_weights_of_0_but_not_for_weights_that_cancel(device: str) -> None:
    y, t = torch.full((2, 3), 0.5, device=device), torch.tensor([0, 1], device=device)
    for weights in ((1.0, -1.0), (0.0, 0.0)):
        sample_weight = torch.tensor(weights, device=device)
        loss = functional.cross_entropy_error(y, t, reduction="mean", sample_weight=sample_weight)
        assert loss.isfinite() == (weights[0] == 0)
