"""Draw what the guard δ does to the cross-entropy of one probability y, and to its gradient.

    python examples/guard.py

writes examples/guard.png.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from torchlosses import CrossEntropyError

DELTA = 1e-7
CURVES = (("−log y", 0.0, "tab:orange", "--"), ("−log (y + δ)", DELTA, "tab:blue", "-"))


def draw() -> Figure:
    """Value and gradient over y on a logarithmic axis, with and without the guard."""
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    target = torch.ones(1, 1, dtype=torch.float64)
    for name, delta, color, style in CURVES:
        y = torch.logspace(-12, 0, 400, dtype=torch.float64)[:, None].requires_grad_()
        loss = CrossEntropyError(delta=delta, reduction="none")(y, target.expand_as(y))
        (slope,) = torch.autograd.grad(loss.sum(), y)
        values.plot(y.detach(), loss.detach(), style, color=color, label=f"E = {name}")
        slopes.plot(y.detach(), -slope, style, color=color, label=f"−∂E/∂y of {name}")
    values.set(xscale="log", ylabel="loss (nats)")
    slopes.set(xscale="log", yscale="log", ylabel="−∂E/∂y (nats per unit of y)")
    limit = -torch.tensor(DELTA).log().item()
    values.axhline(limit, color="gray", lw=0.8, ls=":")
    values.text(3e-6, limit + 0.5, f"−log δ = {limit:.1f}, the loss at y = 0", fontsize=8)
    slopes.axhline(1 / DELTA, color="gray", lw=0.8, ls=":")
    slopes.text(1e-4, 1.6 / DELTA, "1/δ, the slope at y = 0", fontsize=8)
    for axes in (values, slopes):
        axes.axvline(DELTA, color="gray", lw=0.8, ls=":")
        axes.set_xlabel("probability y of the right class")
        axes.legend(loc="upper right" if axes is slopes else "lower left", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    values.text(DELTA * 1.4, 26, "y = δ", fontsize=8, color="gray")
    return figure


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".png")
    draw().savefig(path, dpi=110)
    print(path)
