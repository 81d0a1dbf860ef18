"""`torch.autograd.detect_anomaly` finds wrong values, and correct training raises no alarm."""

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
    """Soft targets as training code computes them, rounded to `dtype` where it rounds them."""
    onehot = nn.functional.one_hot(label, classes)
    other, share = onehot.flip(0), 0.3
    teacher = softmax(len(label), classes, dtype=dtype, scale=4)
    return {
        "one-hot integers": onehot,
        "one-hot booleans": onehot.bool(),
        "label smoothing": (0.9 * onehot + 0.1 / classes).to(dtype),
        "mixup": share * onehot.to(dtype) + (1 - share) * other.to(dtype),
        "mixup in the dtype": onehot * torch.tensor(share, dtype=dtype)
        + other * torch.tensor(1 - share, dtype=dtype),
        "distillation": teacher,
        "distillation in float32": teacher.float(),
        "distillation and label": (0.5 * teacher + 0.5 * onehot).to(dtype),
        "a uniform teacher": torch.zeros(len(label), classes, dtype=dtype).softmax(1),
        "one minus the rest": torch.cat((rest := teacher[:, 1:], 1 - rest.sum(1, True)), 1),
        "one-hot minus one epsilon": (onehot - torch.finfo(dtype).eps * onehot.roll(1, 1)).to(
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
    """Targets, arguments of the call and options, all correct."""
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
def test_correct_training_gives_no_warning_or_error(form: str, dtype: Any, device: str) -> None:
    """Warnings are errors here. Training starts at logits of 0 and ends near one-hot rows."""
    model = nn.Linear(10, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    is_mixed = isinstance(dtype, str)
    half = torch.float16 if dtype == "mixed float16" else torch.bfloat16
    # The gradient by a probability reaches 1/δ, which must fit in float16.
    delta = 1e-3 if half == torch.float16 else 1e-7
    if not is_mixed:
        model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, eps=1e-4)
    # If the scale is too large, anomaly mode itself raises an error.
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
def test_an_input_outside_0_to_1_is_an_error(bad: float) -> None:
    y = torch.full((2, 5), 0.2)
    y[1, 3] = bad
    with pytest.raises(ValueError, match=rf"input: got {bad:g} at position \(1, 3\)"):
        cross_entropy_error(y, torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-7])
def test_rounding_is_tolerated_unless_the_logarithm_is_nan(
    dtype: torch.dtype, delta: float
) -> None:
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


def test_a_second_softmax_is_found_despite_padding_and_a_wider_dtype() -> None:
    y, label = softmax(8, 10, dtype=torch.bfloat16).float(), torch.arange(8)
    with pytest.warns(UserWarning, match="softmax once more"):
        cross_entropy_error(y, label, from_logits=True)
    y[:2] = 0
    with pytest.warns(UserWarning, match=r"softmax once more"):
        cross_entropy_error(y, label.masked_fill(label < 2, -100), from_logits=True)
    with pytest.warns(UserWarning, match=r"position \(2,\)"):
        cross_entropy_error(y, label, from_logits=True, sample_weight=(label > 1).float())
    cross_entropy_error(y, label, from_logits=True)


def test_a_second_softmax_is_found_despite_rows_of_nan() -> None:
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
        ([[1.0, 0.0], [0.0, 1.0]], 1),  # Both rows and columns sum to 1.
        ([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]], 1),
        ([[0.9, 0.2], [0.1, 0.7], [0.0, 0.099]], 1),  # The second column sums to 0.999.
    ],
)
def test_another_dimension_that_sums_to_1_by_chance_gives_no_warning(y: Any, dim: int) -> None:
    y = torch.tensor(y)
    cross_entropy_error(y, torch.zeros(y.shape[:dim] + y.shape[dim + 1 :]).long(), dim=dim)


def test_sigmoids_give_no_warning() -> None:
    """Rows need not sum to 1; and where they do, sums over other dimensions are not checked."""
    for shape in ((2, 2), (2, 3), (8, 10), (4, 5, 6), (1, 3, 4)):
        label = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        for _ in range(50):
            cross_entropy_error(torch.randn(shape).sigmoid(), label)
            cross_entropy_error(softmax(*shape, dtype=torch.float32), label)
            cross_entropy_error(torch.randn(shape), label, from_logits=True)


def test_logits_close_to_a_distribution_give_no_warning() -> None:
    for x in ([0.3, 0.7005], [0.0, 0.9995], [0.5, 0.4991]):
        cross_entropy_error(torch.tensor([x]), torch.tensor([0]), from_logits=True)
    # With one class or no sample, a second softmax cannot be told from logits.
    cross_entropy_error(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), from_logits=True)
    cross_entropy_error(torch.ones(0, 4), torch.ones(0, 4), from_logits=True)


def test_ignored_samples_and_samples_of_weight_0_are_not_checked() -> None:
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
        with pytest.raises(ValueError, match=r"got -7 at position \(1, 0\)"):  # 0 · log −7 is NaN.
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
def test_targets_that_are_not_distributions_are_a_warning(row: list[float], numbers: str) -> None:
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
def test_vmap_over_one_argument_works(name: str) -> None:
    arguments: dict[str, Any] = {
        "input": softmax(4, 3, dtype=torch.float32),
        "target": torch.tensor([0, 1, -100, 2]),
        "sample_weight": torch.ones(4),
    }
    two = torch.stack([arguments[name]] * 2)
    losses = torch.vmap(lambda value: cross_entropy_error(**arguments | {name: value}))(two)
    torch.testing.assert_close(losses, cross_entropy_error(**arguments).expand(2))


def test_values_are_not_checked_without_anomaly_detection() -> None:
    y, two = torch.full((2, 3), 2.0), torch.full((2, 3), 2.0)
    with torch.autograd.set_detect_anomaly(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy_error(y, two)
        cross_entropy_error(y.softmax(1), two, from_logits=True)
