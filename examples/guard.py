"""Draw what the guard δ does, in three pictures.

    python examples/guard.py                    # writes guard.png, breaks.png and learns.png
    python examples/guard.py --output-dir DIR   # there instead of beside this file

guard.png: the loss and its gradient over the probability of the right class.

breaks.png: one network on the 1,797 digits that scikit-learn carries, trained on four forms of the
cross-entropy, where one training image in a hundred was never divided by 255. Float32, pixels from
0 to 1, 100 ReLUs, batches of 32, SGD with a learning rate of 0.05. At 0.03 to 0.3 the first form
breaks as early; from 0.1 on, a few runs of the second and third get stuck at 10 %.

learns.png: why the cross-entropy learns faster than squares behind a softmax, on the same images
and network, all of them divided, with a learning rate of 0.3.
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
STEPS, SHARE, FACTOR = 300, 0.01, 255
SEEDS = range(10)
BLUE, ORANGE, RED, GRAY = "tab:blue", "tab:orange", "tab:red", "tab:gray"
Loss = Callable[[Tensor, Tensor], Tensor]


def clipped(logits: Tensor, label: Tensor) -> Tensor:
    """Keras' cross-entropy of probabilities: cut to [δ, 1 − δ], where the gradient ends."""
    y = logits.softmax(1).gather(1, label.unsqueeze(1))
    return -y.clip(DELTA, 1 - DELTA).log().mean()


def of_probabilities(criterion: nn.Module) -> Loss:
    return lambda logits, label: criterion(logits.softmax(1), label)


NO_GUARD, GUARD, CLIP, LOGITS = "δ = 0", "δ = 1e-7", "clip at 1e-7", "from logits, δ = 0"
FORMS: dict[str, Loss] = {
    NO_GUARD: of_probabilities(CrossEntropyError(delta=0, reduction="mean")),
    CLIP: clipped,
    GUARD: of_probabilities(CrossEntropyError(delta=DELTA, reduction="mean")),
    LOGITS: CrossEntropyError(from_logits=True, delta=0, reduction="mean"),
}
COLORS = {NO_GUARD: RED, CLIP: ORANGE, GUARD: BLUE, LOGITS: GRAY}


class Step(NamedTuple):
    """Of a batch the loss and the least probability of a right class; the accuracy after it."""

    loss: float
    least: float
    accuracy: float


@cache
def digits() -> list[Tensor]:
    """Images and labels for training, then for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    images, test_images, labels, test_labels = map(torch.tensor, parts)
    return [images.float() / 16, labels, test_images.float() / 16, test_labels]


def train(loss: Loss, rate: float, steps: int, seed: int, *, share: float = 0) -> Iterator[Step]:
    """SGD on batches that are the same for every loss; ends when the loss is not finite.

    A `share` of the training images comes FACTOR times as bright.
    """
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    is_bright = torch.rand(len(images), 1, generator=generator) < share
    images = torch.where(is_bright, FACTOR * images, images)
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
            right = network(test_images).argmax(1) == test_labels
        yield Step(error.item(), least.item(), right.float().mean().item())
        if not error.isfinite():
            return


def train_form(form: str, seed: int, steps: int = STEPS) -> list[Step]:
    """A run of breaks.png."""
    return list(train(FORMS[form], 0.05, steps, seed, share=SHARE))


def draw_guard() -> Figure:
    """Value and gradient over y on a logarithmic axis, with and without the guard."""
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figure.suptitle("The guard bounds the loss at log 0, and its gradient")
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
    """Loss and accuracy over the steps of seed 0, and the accuracy at the end of ten seeds."""
    ratios = {"width_ratios": (4, 4, 3)}
    figure, plots = plt.subplots(
        1, 3, figsize=(11.5, 3.9), layout="constrained", gridspec_kw=ratios
    )
    losses, accuracies, ends = plots
    figure.suptitle("Without the guard one image that is too bright breaks the training")
    runs = {form: [train_form(form, seed) for seed in SEEDS] for form in FORMS}
    for place, (form, (run, *_)) in enumerate(runs.items()):
        color = COLORS[form]
        losses.plot([max(step.loss, 1e-4) for step in run], color=color, lw=1, label=form)
        accuracies.plot([step.accuracy for step in run], color=color, lw=1.4, label=form)
        reached = [steps[-1].accuracy for steps in runs[form]]
        shifts = [place + 0.035 * (seed - 4.5) for seed in SEEDS]
        ends.plot(shifts, reached, "o", color=color, ms=5, alpha=0.8)
    broken = len(runs[NO_GUARD][0]) - 1
    mark(losses, broken, 150, "loss ∞", (broken + 12, 200), RED)
    words = "a probability is 0: loss ∞, weights NaN"
    mark(accuracies, broken, runs[NO_GUARD][0][-1].accuracy, words, (30, 1.24), RED)
    cut = next(i for i, step in enumerate(runs[CLIP][0]) if step.least < DELTA)
    words = "y < 1e-7: for that image the clip has no gradient"
    mark(accuracies, cut, runs[CLIP][0][cut].accuracy, words, (30, 1.14), ORANGE)
    later = broken + 60
    mark(accuracies, later, runs[GUARD][0][later].accuracy, "the guard goes on", (80, 1.04), BLUE)
    losses.set(xlabel="step", ylabel="loss of the batch (nats)", yscale="log", ylim=(0.2, 400))
    losses.legend(fontsize=8, loc="upper right")
    ticks = [number / 5 for number in range(6)]  # The words stand above them.
    accuracies.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1.32), yticks=ticks)
    ends.set(ylabel="test accuracy at the end, ten seeds", ylim=(0, 1))
    ends.set_xticks(range(len(FORMS)), [form.replace(", ", ",\n") for form in FORMS], fontsize=8)
    for axes, title in zip(plots, ("seed 0", "seed 0", "seeds 0 to 9"), strict=True):
        axes.set_title(title, fontsize=9)
    return tidy(figure)


def mark(
    axes: Axes, x: float, y: float, words: str, place: tuple[float, float], color: str
) -> None:
    axes.plot([x], [y], "X", color=color, ms=8, clip_on=False, zorder=3)
    axes.annotate(
        words,
        (x, y),
        place,
        color=color,
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": color},
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def squares_slope(p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit, where the other nine share 1 − p alike."""
    return 10 / 9 * p * (1 - p) ** 2


def entropy_slope(p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit; the guard's factor p/(p+δ) is 1 − 1e-5 at p = 0.01."""
    return (1 - p) * p / (p + DELTA)


BEHIND_SOFTMAX: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], str, str]] = {
    "cross-entropy": (CrossEntropyError(reduction="batchmean"), entropy_slope, "1 − p", BLUE),
    "squares": (SumSquaredError(reduction="batchmean"), squares_slope, "(10/9) p (1 − p)²", ORANGE),
}


def autograd_slope(criterion: nn.Module, p: Tensor) -> Tensor:
    """−∂E/∂x of the right class's logit among ten by autograd, for each p."""
    logits = torch.zeros(len(p), 10, dtype=p.dtype)
    logits[:, 0] = (9 * p / (1 - p)).log()
    logits.requires_grad_()
    loss = criterion(logits.softmax(1), torch.zeros(len(p), dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss * len(p), logits)
    return -gradient[:, 0]


def draw_learns(steps: int = 400) -> Figure:
    """The gradient of both losses by the right class's logit, and their accuracy over the steps."""
    figure, (slopes, accuracies) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    figure.suptitle("Why cross-entropy learns faster: where p is small, squares hardly push")
    line = torch.linspace(1e-4, 1, 300, dtype=torch.float64)
    points = torch.linspace(0.01, 0.99, 15, dtype=torch.float64)
    for name, (criterion, formula, words, color) in BEHIND_SOFTMAX.items():
        slopes.plot(line, formula(line), color=color, label=f"{name}: {words}")
        slopes.plot(points, autograd_slope(criterion, points), "o", color=color, ms=4)
        for rate, style in ((0.3, "-"), (3.0, ":")):
            if (name, rate) == ("cross-entropy", 3.0):
                continue
            run = train(of_probabilities(criterion), rate, steps, 0)
            label = f"{name}, learning rate {rate:g}"
            accuracies.plot(
                [step.accuracy for step in run], style, color=color, lw=1.2, label=label
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
