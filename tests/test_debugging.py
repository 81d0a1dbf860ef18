"""Under `torch.autograd.detect_anomaly` what is wrong is found, and right training is silent."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlosses import CrossEntropyError, SumSquaredError
from torchlosses.functional import cross_entropy_error, sum_squared_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _anomaly(device: str) -> Iterator[None]:
    with torch.device(device), torch.autograd.set_detect_anomaly(True):
        yield


def softmax(*shape: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).softmax(1)


def soft_targets(label: Tensor, classes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As they come about, rounded to `dtype` where that is how they do."""
    onehot = nn.functional.one_hot(label, classes)
    other, share = onehot.flip(0), 0.3
    teacher = softmax(len(label), classes, dtype=dtype, scale=4)
    return {
        "one-hot integers": onehot,
        "one-hot booleans": onehot.bool(),
        "label smoothing": (0.9 * onehot + 0.1 / classes).to(dtype),
        "mixup": share * onehot.to(dtype) + (1 - share) * other.to(dtype),
        "mixup of what is rounded": onehot * torch.tensor(share, dtype=dtype)
        + other * torch.tensor(1 - share, dtype=dtype),
        "distillation": teacher,
        "distillation, widened": teacher.float(),
        "distillation and label": (0.5 * teacher + 0.5 * onehot).to(dtype),
        "a uniform teacher": torch.zeros(len(label), classes, dtype=dtype).softmax(1),
        "one minus the rest": torch.cat((rest := teacher[:, 1:], 1 - rest.sum(1, True)), 1),
        "one minus what was rounded up": (onehot - torch.finfo(dtype).eps * onehot.roll(1, 1)).to(
            dtype
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 10, 1000, 151_936])
def test_soft_targets_are_distributions_up_to_rounding(dtype: torch.dtype, classes: int) -> None:
    label = torch.arange(4) % classes
    for name, target in soft_targets(label, classes, dtype).items():
        try:
            cross_entropy_error(softmax(4, classes, dtype=dtype), target)
        except UserWarning as warning:
            pytest.fail(f"{name}: {warning}")


def batches(form: str) -> Iterator[tuple[Any, dict[str, Tensor], dict[str, Any]]]:
    """Targets, arguments of the call and options of training that is right."""
    for _ in range(5):
        label = torch.randint(10, (16,))
        yield label, {}, {}
        yield label.where(torch.rand(16) < 0.7, -100), {}, {}
        yield label, {"sample_weight": (torch.rand(16) < 0.7).float()}, {}
        if form != "squares":
            yield label, {}, {"label_smoothing": 0.1, "weight": torch.rand(10)}
            yield torch.full((16,), -100), {}, {}
        for target in soft_targets(label, 10, torch.bfloat16).values():
            yield target, {}, {} if form == "squares" else {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("kernels", torch.float32),
        ("kernels", torch.bfloat16),
        ("kernels", "mixed bfloat16"),
        ("kernels", "mixed float16"),
        ("formula", "mixed float16"),
    ],
    indirect=["path"],
)
@pytest.mark.parametrize("form", ["squares", "probabilities", "logits"])
def test_training_that_is_right_is_silent(form: str, dtype: Any, device: str) -> None:
    """Warnings are errors here. From logits of 0 to such as nearly make one-hot rows."""
    model = nn.Linear(10, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    is_mixed = isinstance(dtype, str)
    half = torch.float16 if dtype == "mixed float16" else torch.bfloat16
    # The slope of a probability has to be one of float16, which its softmax is in here.
    delta = 1e-3 if half == torch.float16 else 1e-7
    if not is_mixed:
        model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, eps=1e-4)
    # Of a scale that is too large anomaly mode itself makes an error.
    scaler = torch.amp.GradScaler(device, init_scale=1, enabled=half == torch.float16)
    for target, arguments, options in batches(form):
        if form == "squares":
            criterion: nn.Module = SumSquaredError()
        else:
            criterion = CrossEntropyError(from_logits=form == "logits", delta=delta, **options)
        label = target if target.dim() == 1 else target.float().argmax(1)
        x = nn.functional.one_hot(label.clamp(min=0), 10).to(model.weight.dtype)
        with torch.autocast(device, half, enabled=is_mixed):
            logits = model(3 * x)
            loss = criterion(logits if form == "logits" else logits.softmax(1), target, **arguments)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("bad", [-0.01, 1.01, 7.5, torch.inf])
def test_what_is_no_probability_is_an_error(bad: float) -> None:
    y = torch.full((2, 5), 0.2)
    y[1, 3] = bad
    with pytest.raises(ValueError, match=rf"input: got {bad:g} at position \(1, 3\)"):
        cross_entropy_error(y, torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-7])
def test_no_rounding_excuses_a_logarithm_that_is_nan(dtype: torch.dtype, delta: float) -> None:
    y = torch.tensor([[1.0, -delta - torch.finfo(dtype).eps]], dtype=dtype)
    with pytest.raises(ValueError, match=r"input: got -.* at position \(0, 1\)"):
        cross_entropy_error(y, torch.tensor([1]), delta=delta)
    y = torch.tensor([[1 + torch.finfo(dtype).eps, -0.0]], dtype=dtype)
    assert not cross_entropy_error(y, torch.tensor([1]), delta=delta).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_index", [True, False])
def test_a_missing_softmax_is_an_error(dtype: torch.dtype, is_index: bool) -> None:
    x = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 3.0]], dtype=dtype)
    target = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"input: got 3 at position \(1, 2\).*from_logits=True"):
        cross_entropy_error(x, target if is_index else nn.functional.one_hot(target, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("classes", [2, 10, 50_000])
def test_a_second_softmax_is_a_warning(dtype: torch.dtype, rows: int, classes: int) -> None:
    y, label = softmax(rows, classes, dtype=dtype, scale=3), torch.zeros(rows, dtype=torch.int64)
    message = r"input: .* probability .*position \(0,\).*sum of .*from_logits=False"
    for target in (label, nn.functional.one_hot(label, classes)):
        with pytest.warns(UserWarning, match=message):
            cross_entropy_error(y, target, from_logits=True)


def test_a_second_softmax_is_found_beside_padding_and_in_a_wider_dtype() -> None:
    y, label = softmax(8, 10, dtype=torch.bfloat16).float(), torch.arange(8)
    with pytest.warns(UserWarning, match="softmax once more"):
        cross_entropy_error(y, label, from_logits=True)
    y[:2] = 0
    with pytest.warns(UserWarning, match=r"softmax once more"):
        cross_entropy_error(y, label.masked_fill(label < 2, -100), from_logits=True)
    with pytest.warns(UserWarning, match=r"position \(2,\)"):
        cross_entropy_error(y, label, from_logits=True, sample_weight=(label > 1).float())
    cross_entropy_error(y, label, from_logits=True)


def test_a_row_of_nan_hides_no_second_softmax() -> None:
    y, label = softmax(8, 10, dtype=torch.float32), torch.arange(8)
    y[0, 3] = y[5] = torch.nan
    with pytest.warns(UserWarning, match=r"position \(1,\).*softmax once more"):
        cross_entropy_error(y, label, from_logits=True)
    cross_entropy_error(torch.full((8, 10), torch.nan), label, from_logits=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim", "wrong"),
    [((8, 10), 1, 0), ((2, 3), 1, 0), ((4, 6, 10), 2, 1), ((4, 6, 10), 1, 2), ((2, 5, 4, 3), 1, 3),
     ((1, 6, 10), 2, 1), ((3, 2000), 0, 1), ((9, 9), 1, 0)],
)  # fmt: skip
def test_a_softmax_over_the_wrong_dimension_is_a_warning(
    shape: tuple[int, ...], dim: int, wrong: int, dtype: torch.dtype
) -> None:
    y = (3 * torch.randn(shape)).to(dtype).softmax(wrong)
    label = torch.zeros(shape[:dim] + shape[dim + 1 :], dtype=torch.int64)
    message = f"sum to 1 over dimension {wrong}, but the classes are in dimension {dim}"
    with pytest.warns(UserWarning, match=f"{message}.*softmax over dimension {dim}.*dim={wrong}"):
        cross_entropy_error(y, label, dim=dim)
    with pytest.warns(UserWarning, match=f"{message}; pass the logits"):
        cross_entropy_error(y, label, dim=dim, from_logits=True)
    y.view(-1)[0] = torch.nan
    with pytest.warns(UserWarning, match=message):
        cross_entropy_error(y, label, dim=dim, sample_weight=torch.rand(label.shape))


@pytest.mark.parametrize(
    ("y", "dim"),
    [
        ([[0.3, 0.9], [0.7, 0.3]], 1),  # One column alone sums to 1.
        ([[0.3], [0.7]], 1),  # One class: a probability for each of two samples.
        ([[1.0, 1.0, 1.0]], 1),  # One sample: each column sums to 1 by itself.
        ([[[0.5, 0.5]], [[0.5, 0.5]]], 2),
        ([[1.0, 0.0], [0.0, 1.0]], 1),  # Rows and columns.
        ([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]], 1),
        ([[0.9, 0.2], [0.1, 0.7], [0.0, 0.099]], 1),  # Nearly.
    ],
)
def test_probabilities_over_another_dimension_by_chance_are_silent(y: Any, dim: int) -> None:
    y = torch.tensor(y)
    cross_entropy_error(y, torch.zeros(y.shape[:dim] + y.shape[dim + 1 :]).long(), dim=dim)


def test_sigmoids_are_silent() -> None:
    """No row has to sum to 1, and no other sum is looked at where the right one is 1."""
    for shape in ((2, 2), (2, 3), (8, 10), (4, 5, 6), (1, 3, 4)):
        label = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        for _ in range(50):
            cross_entropy_error(torch.randn(shape).sigmoid(), label)
            cross_entropy_error(softmax(*shape, dtype=torch.float32), label)
            cross_entropy_error(torch.randn(shape), label, from_logits=True)


def test_logits_that_come_close_to_a_distribution_are_none() -> None:
    for x in ([0.3, 0.7005], [0.0, 0.9995], [0.5, 0.4991]):
        cross_entropy_error(torch.tensor([x]), torch.tensor([0]), from_logits=True)
    # Where there is one class, or no sample, there is nothing to tell them by.
    cross_entropy_error(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), from_logits=True)
    cross_entropy_error(torch.ones(0, 4), torch.ones(0, 4), from_logits=True)


def test_samples_that_count_for_nothing_may_hold_anything() -> None:
    y, label = softmax(4, 5, dtype=torch.float32), torch.tensor([0, -100, 2, 3])
    y[1] = torch.tensor([-3, 7, torch.nan, torch.inf, 0])
    cross_entropy_error(y, label)
    with pytest.raises(ValueError, match=r"got 7 at position \(1, 1\)"):
        cross_entropy_error(y.clamp(min=0), label.abs() % 5)
    y[1] = 7
    weight = torch.tensor([1.0, 0, 1, 1])
    padded = softmax(4, 5, dtype=torch.float32) * weight.unsqueeze(1)
    for target in (label.clamp(min=0), padded):
        assert cross_entropy_error(y, target, sample_weight=weight).isfinite()
        with pytest.raises(ValueError, match=r"got -7 at position \(1, 0\)"):  # It makes NaN.
            cross_entropy_error(-y.abs().where(y > 1, -y), target, sample_weight=weight)


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        ([0.5, 0.6, 0.0], "from 0 to 0.6 and a sum of 1.1"),
        ([-0.25, 1.25, 0.0], "from -0.25 to 1.25 and a sum of 1"),
        ([4.0, -2.0, 1.0], "from -2 to 4 and a sum of 3"),
        ([0.0, 0.0, 0.0], "from 0 to 0 and a sum of 0"),
        ([0.5, 0.0, 0.45], "a sum of 0.95"),
        ([-0.005, 0.5, 0.505], "from -0.005"),
    ],
)
def test_targets_that_are_no_distribution_are_a_warning(row: list[float], numbers: str) -> None:
    good = [0.2, 0.3, 0.5]
    target = torch.tensor([[good, good], [good, row]])
    message = rf"target: the row at position \(1, 1\).*{numbers}.*sum to 1.*softmax"
    for from_logits in (False, True):
        with pytest.warns(UserWarning, match=message):
            cross_entropy_error(torch.full((2, 2, 3), 0.3), target, dim=-1, from_logits=from_logits)
        with pytest.warns(UserWarning, match=message):
            cross_entropy_error(
                torch.full((2, 3, 2), 0.3), target.mT.contiguous(), from_logits=from_logits
            )


@pytest.mark.parametrize("loss", [sum_squared_error, cross_entropy_error])
def test_a_bad_class_is_an_error(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(
        IndexError, match=r"target: got class 5 at position \(1,\); expected 0 to 4"
    ):
        loss(softmax(2, 5, dtype=torch.float32), torch.tensor([0, 5]))


@pytest.mark.parametrize("name", ["input", "target", "sample_weight"])
def test_vmap_over_one_argument_is_served(name: str) -> None:
    arguments: dict[str, Any] = {
        "input": softmax(4, 3, dtype=torch.float32),
        "target": torch.tensor([0, 1, -100, 2]),
        "sample_weight": torch.ones(4),
    }
    two = torch.stack([arguments[name]] * 2)
    losses = torch.vmap(lambda value: cross_entropy_error(**arguments | {name: value}))(two)
    torch.testing.assert_close(losses, cross_entropy_error(**arguments).expand(2))


def test_without_the_switch_nothing_is_looked_at() -> None:
    y, two = torch.full((2, 3), 2.0), torch.full((2, 3), 2.0)
    with torch.autograd.set_detect_anomaly(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy_error(y, two)
        cross_entropy_error(y.softmax(1), two, from_logits=True)
