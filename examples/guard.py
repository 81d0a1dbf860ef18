"""Draw what the guard δ does, in three pictures.

    python examples/guard.py                    # writes guard.png, breaks.png and learns.png
    python examples/guard.py --output-dir DIR   # writes them to DIR, not beside this file

guard.png: the loss and its gradient over the probability of the right class, with and without δ.

breaks.png: a network trained with four forms of the cross-entropy on scikit-learn's 1,797 digits,
with one training image in a hundred 255 times too bright. Float32, pixels from 0 to 1, one hidden
layer of 100 ReLUs, batches of 32, SGD with a learning rate of 0.05. At rates from 0.03 to 0.3 the
first form breaks as early; from 0.1 on, a few runs of the second and third get stuck at 10 %.

learns.png: why the cross-entropy learns faster than squares behind a softmax. The same network and
images, none of them too bright, with a learning rate of 0.3.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from torchlosses import CrossEntropyError, SumSquaredError

DELTA = 1e-7
STEPS, BRIGHT_SHARE, BRIGHT_FACTOR = 300, 0.01, 255
SEEDS = range(10)
BLUE, ORANGE, RED, GRAY = "tab:blue", "tab:orange", "tab:red", "tab:gray"
Loss = Callable[[Tensor, Tensor], Tensor]


def clipped_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Keras' cross-entropy of probabilities: clipped to [δ, 1 − δ], with no gradient outside."""
    y = logits.softmax(1).gather(1, label.unsqueeze(1))
    return -y.clip(DELTA, 1 - DELTA).log().mean()


def behind_softmax(criterion: nn.Module) -> Loss:
    return lambda logits, label: criterion(logits.softmax(1), label)


NO_GUARD, GUARD, CLIP, LOGITS = "δ = 0", "δ = 1e-7", "clip at 1e-7", "from logits, δ = 0"
FORMS: dict[str, Loss] = {
    NO_GUARD: behind_softmax(CrossEntropyError(delta=0, reduction="mean")),
    CLIP: clipped_cross_entropy,
    GUARD: behind_softmax(CrossEntropyError(delta=DELTA, reduction="mean")),
    LOGITS: CrossEntropyError(from_logits=True, delta=0, reduction="mean"),
}
COLORS = {NO_GUARD: RED, CLIP: ORANGE, GUARD: BLUE, LOGITS: GRAY}


class Step(NamedTuple):
    """The loss of a batch, its least probability of a right class, and the accuracy afterwards."""

    loss: float
    least_probability: float
    test_accuracy: float


@cache
def digits() -> list[Tensor]:
    """Training images, training labels, test images, test labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    images, test_images, labels, test_labels = map(torch.tensor, parts)
    return [images.float() / 16, labels, test_images.float() / 16, test_labels]


def train(
    loss: Loss, rate: float, steps: int, seed: int, *, bright_share: float = 0
) -> Iterator[Step]:
    """SGD with the same batches for every loss, which ends if the loss is infinite or NaN.

    A `bright_share` of the training images is BRIGHT_FACTOR times too bright.
    """
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    is_bright = torch.rand(len(images), 1, generator=generator) < bright_share
    images = torch.where(is_bright, BRIGHT_FACTOR * images, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    parameters = list(network.parameters())
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,), generator=generator)
        logits, label = network(images[batch]), labels[batch]
        error = loss(logits, label)
        gradients = torch.autograd.grad(error, parameters)
        with torch.no_grad():
            least = logits.softmax(1).gather(1, label.unsqueeze(1)).min()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
            is_right = network(test_images).argmax(1) == test_labels
        yield Step(error.item(), least.item(), is_right.float().mean().item())
        if not error.isfinite():
            return


def train_form(form: str, seed: int, steps: int = STEPS) -> list[Step]:
    """One run of breaks.png."""
    return list(train(FORMS[form], 0.05, steps, seed, bright_share=BRIGHT_SHARE))


def draw_guard() -> Figure:
    """Loss and gradient over y on a logarithmic axis, with and without the guard."""
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figure.suptitle("The guard bounds the loss and its gradient at y = 0")
    target = torch.ones(1, 1, dtype=torch.float64)
    curves = (("−log y", 0.0, ORANGE, "--"), ("−log (y + δ)", DELTA, BLUE, "-"))
    for name, delta, color, style in curves:
        y = torch.logspace(-12, 0, 400, dtype=torch.float64)[:, None].requires_grad_()
        loss = CrossEntropyError(delta=delta, reduction="none")(y, target.expand_as(y))
        (slope,) = torch.autograd.grad(loss.sum(), y)
        values.plot(y.detach(), loss.detach(), style, color=color, label=f"E = {name}")
        slopes.plot(y.detach(), -slope, style, color=color, label=f"−∂E/∂y of {name}")
    values.set(xscale="log", ylabel="loss (nats)")
    slopes.set(xscale="log", yscale="log", ylabel="−∂E/∂y (nats per unit of y)")
    limit = -math.log(DELTA)
    values.axhline(limit, color=GRAY, lw=0.8, ls=":")
    values.text(3e-6, limit + 0.5, f"−log δ = {limit:.1f}, the loss at y = 0", fontsize=8)
    slopes.axhline(1 / DELTA, color=GRAY, lw=0.8, ls=":")
    slopes.text(1e-4, 1.6 / DELTA, "1/δ, the slope at y = 0", fontsize=8)
    for axes in (values, slopes):
        axes.axvline(DELTA, color=GRAY, lw=0.8, ls=":")
        axes.set_xlabel("probability y of the right class")
        axes.legend(loc="upper right" if axes is slopes else "lower left", fontsize=8)
    values.text(DELTA * 1.4, 26, "y = δ", fontsize=8, color=GRAY)
    return tidy(figure)


def draw_breaks() -> Figure:
    """Loss and accuracy over the steps with seed 0, and the final accuracy with each seed."""
    ratios = {"width_ratios": (4, 4, 3)}
    figure, plots = plt.subplots(
        1, 3, figsize=(11.5, 3.9), layout="constrained", gridspec_kw=ratios
    )
    losses, accuracies, ends = plots
    figure.suptitle("Without the guard, one image that is too bright ends the training")
    runs = {form: [train_form(form, seed) for seed in SEEDS] for form in FORMS}
    for column, (form, (run, *_)) in enumerate(runs.items()):
        color = COLORS[form]
        losses.plot([max(step.loss, 1e-4) for step in run], color=color, lw=1, label=form)
        accuracies.plot([step.test_accuracy for step in run], color=color, lw=1.4, label=form)
        final = [steps[-1].test_accuracy for steps in runs[form]]
        positions = [column + 0.035 * (seed - 4.5) for seed in SEEDS]
        ends.plot(positions, final, "o", color=color, ms=5, alpha=0.8)
    broken, clipped = runs[NO_GUARD][0], runs[CLIP][0]
    last = len(broken) - 1
    mark(losses, last, 150, "a probability is 0:\nthe loss is ∞", (8, -9), RED)
    mark(accuracies, last, broken[last].test_accuracy, "all weights are NaN", (6, -14), RED)
    first = next(i for i, step in enumerate(clipped) if step.least_probability < DELTA)
    words = "a probability is below 1e-7:\nthe clip has no gradient"
    mark(losses, first, clipped[first].loss, words, (-3, -40), ORANGE)
    losses.set(xlabel="step", ylabel="loss of the batch (nats)", yscale="log", ylim=(0.2, 400))
    losses.legend(fontsize=8, loc="upper right")
    accuracies.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    ends.set(ylabel="test accuracy after the last step", ylim=(0, 1))
    ends.set_xticks(range(len(FORMS)), [form.replace(", ", ",\n") for form in FORMS], fontsize=8)
    for axes, title in zip(plots, ("seed 0", "seed 0", "seeds 0 to 9"), strict=True):
        axes.set_title(title, fontsize=9)
    return tidy(figure)


def mark(
    axes: Axes, x: float, y: float, words: str, offset: tuple[float, float], color: str
) -> None:
    """A cross, and words at an offset in points."""
    axes.plot([x], [y], "X", color=color, ms=8, clip_on=False, zorder=3)
    axes.annotate(words, (x, y), offset, textcoords="offset points", color=color, fontsize=8)


def squares_slope(p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit, if the other nine classes share 1 − p equally."""
    return 10 / 9 * p * (1 - p) ** 2


def entropy_slope(p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit, with the guard's factor p/(p+δ)."""
    return (1 - p) * p / (p + DELTA)


BEHIND_SOFTMAX: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], str, str]] = {
    "cross-entropy": (CrossEntropyError(reduction="batchmean"), entropy_slope, "1 − p", BLUE),
    "squares": (SumSquaredError(reduction="batchmean"), squares_slope, "(10/9) p (1 − p)²", ORANGE),
}


def autograd_slope(criterion: nn.Module, p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit among ten, by autograd, for each p."""
    logits = torch.zeros(len(p), 10, dtype=p.dtype)
    logits[:, 0] = (9 * p / (1 - p)).log()
    logits.requires_grad_()
    loss = criterion(logits.softmax(1), torch.zeros(len(p), dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss * len(p), logits)
    return -gradient[:, 0]


def draw_learns(steps: int = 400) -> Figure:
    """The gradient of both losses by the right class's logit, and the accuracy over the steps."""
    figure, (slopes, accuracies) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    figure.suptitle("Cross-entropy learns faster: where p is small, squares have a small gradient")
    line = torch.linspace(1e-4, 1, 300, dtype=torch.float64)
    points = torch.linspace(0.01, 0.99, 15, dtype=torch.float64)
    for name, (criterion, formula, words, color) in BEHIND_SOFTMAX.items():
        slopes.plot(line, formula(line), color=color, label=f"{name}: {words}")
        slopes.plot(points, autograd_slope(criterion, points), "o", color=color, ms=4)
        for rate, style in ((0.3, "-"), (3.0, ":")):
            if (name, rate) == ("cross-entropy", 3.0):
                continue
            run = train(behind_softmax(criterion), rate, steps, 0)
            label = f"{name}, learning rate {rate:g}"
            accuracies.plot(
                [step.test_accuracy for step in run], style, color=color, lw=1.2, label=label
            )
    slopes.plot([], [], "o", color=GRAY, ms=4, label="autograd")
    slopes.set(xlabel="probability p of the right class", ylabel="−∂E/∂x of its logit x")
    accuracies.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    slopes.legend(fontsize=8)
    accuracies.legend(fontsize=8, loc="lower right")
    return tidy(figure)


def tidy(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "guard": draw_guard,
    "breaks": draw_breaks,
    "learns": draw_learns,
}


def main(arguments: list[str] | None = None) -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    directory = parser.parse_args(arguments).output_dir
    for name, draw in PICTURES.items():
        path = directory / f"{name}.png"
        figure = draw()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
