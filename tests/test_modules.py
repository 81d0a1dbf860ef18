"""The modules: options, repr, state, copies, devices and scripting."""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlosses import (
    CrossEntropyError,
    LinearCrossEntropyError,
    SumSquaredError,
    functional,
)

OPTIONS: dict[str, Any] = {
    "reduction": "mean",
    "delta": 1e-3,
    "from_logits": True,
    "dim": -1,
    "ignore_index": 7,
    "label_smoothing": 0.25,
}


def criteria() -> list[nn.Module]:
    return [
        SumSquaredError(),
        SumSquaredError(reduction="mean", dim=-1, ignore_index=7),
        CrossEntropyError(),
        CrossEntropyError(weight=torch.rand(5), **OPTIONS),
    ]


def arguments(device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 5, generator=generator).to(device), torch.arange(4, device=device)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (SumSquaredError, functional.sum_squared_error),
        (CrossEntropyError, functional.cross_entropy_error),
    ],
)
def test_module_and_function_have_the_same_options(
    module: type, function: Callable[..., Tensor]
) -> None:
    of_function = dict(inspect.signature(function).parameters)
    of_module = dict(inspect.signature(module).parameters)
    for name in ("input", "target", "sample_weight"):
        del of_function[name]
    assert of_module == of_function
    assert all(option.kind == option.KEYWORD_ONLY for option in of_module.values())


def test_every_option_reaches_the_function() -> None:
    y = torch.rand(2, 3, 5)
    t = torch.tensor([[0, 1, 2], [3, 4, 7]])
    w = torch.rand(2, 3)
    weight = torch.rand(5)
    module = CrossEntropyError(weight=weight, **OPTIONS)
    expected = functional.cross_entropy_error(y, t, weight=weight, sample_weight=w, **OPTIONS)
    assert module(y, t, sample_weight=w) == expected
    options = {name: OPTIONS[name] for name in ("reduction", "dim", "ignore_index")}
    expected = functional.sum_squared_error(y, t, sample_weight=w, **options)
    assert SumSquaredError(**options)(y, t, sample_weight=w) == expected


def test_repr_shows_the_options() -> None:
    assert repr(SumSquaredError(reduction="mean", dim=2, ignore_index=7)) == (
        "SumSquaredError(reduction='mean', dim=2, ignore_index=7)"
    )
    assert repr(CrossEntropyError(weight=torch.ones(5), **OPTIONS)) == (
        "CrossEntropyError(weight=tensor of (5,), reduction='mean', delta=0.001, "
        "from_logits=True, dim=-1, ignore_index=7, label_smoothing=0.25)"
    )


@pytest.mark.parametrize("index", range(4))
def test_copies_and_pickles_are_equal(index: int) -> None:
    criterion = criteria()[index]
    expected = criterion(*arguments())
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(file, weights_only=False),
    ):
        assert repr(twin) == repr(criterion)
        assert twin(*arguments()) == expected


@pytest.mark.parametrize(
    "module",
    [SumSquaredError, CrossEntropyError, functools.partial(LinearCrossEntropyError, 5, 5)],
)
def test_the_reduction_may_be_changed_and_restored(module: Any, device: str) -> None:
    """fastai, Opacus and captum do so around a call."""
    criterion, (y, t) = module(reduction="mean").to(device), arguments(device)
    mean = criterion(y, t)
    criterion.reduction = "none"
    losses = criterion(y, t)
    assert losses.shape[0] == len(y)
    torch.testing.assert_close(losses.mean(), mean)
    criterion.reduction = "sum"
    torch.testing.assert_close(criterion(y, t), losses.sum())
    criterion.reduction = "mean"
    assert criterion(y, t) == mean
    assert "reduction='mean'" in repr(criterion)


def test_class_weights_are_a_buffer(device: str) -> None:
    criterion = CrossEntropyError(weight=torch.rand(5))
    assert list(criterion.state_dict()) == ["weight"]
    assert list(criterion.parameters()) == []
    other = CrossEntropyError(weight=torch.zeros(5))
    other.load_state_dict(criterion.state_dict())
    assert other(*arguments()) == criterion(*arguments())
    moved = copy.deepcopy(criterion).to(device)
    assert moved.weight is not None
    assert moved.weight.device.type == device
    torch.testing.assert_close(moved(*arguments(device)).cpu(), criterion(*arguments()))
    assert copy.deepcopy(criterion).half().weight.dtype == torch.float16  # type: ignore[union-attr]
    assert CrossEntropyError().state_dict() == {}


class ModelWithLoss(nn.Module):
    """A model with a loss as a submodule that `forward` does not use."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.criterion = criterion

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.layer(input)
        return result


def test_a_model_with_a_loss_can_be_scripted_and_saved() -> None:
    for criterion in (*criteria(), LinearCrossEntropyError(3, 2, weight=torch.ones(2))):
        model = ModelWithLoss(criterion)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        input = torch.randn(4, 3)
        assert torch.equal(torch.jit.load(file)(input), model(input))


def test_training_loop_learns(device: str) -> None:
    x = torch.randn(64, 10, device=device)
    t = (x[:, 0] > 0).long()
    for criterion in (SumSquaredError(), CrossEntropyError()):
        network = nn.Sequential(nn.Linear(10, 2), nn.Softmax(1)).to(device)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            criterion(network(x), t).backward()
            optimizer.step()
        assert (network(x).argmax(1) == t).float().mean() > 0.95
