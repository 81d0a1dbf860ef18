"""How fast the losses are on this machine, beside torch's own and beside what its memory allows.

    python examples/benchmark.py                          # every workload: some ten minutes
    python examples/benchmark.py --shapes 4096x8192 --dtypes float32 --rounds 15

The contenders of a workload take turns within one run, so that a machine whose speed drifts treats
all alike, and the table gives ratios first: how many times as long as torchlosses another takes, by
the medians. The floor reads each argument once, and allocates and writes the gradient once; beside
it stands how many times as long as the floor torchlosses takes. `memory` is the peak of what is
allocated beyond the arguments, in units of the input's size. A CSV with all times, and a picture,
go to `runs/`.
"""

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile
from torch.utils.benchmark import Timer

from torchlosses.functional import cross_entropy_error, sum_squared_error

DELTA = 1e-7
SHAPES = ("64x10", "1024x1000", "4096x8192", "16x21x256x256")
DTYPES = ("float32", "bfloat16")
STEPS = {"forward": None, "backward": 1.0, "backward of 0.5": 0.5}  # Names and upstream gradients.
RIVALS = ("torch", "eager", "compiled", "floor")

Loss = Callable[[Tensor, Tensor], Tensor]


# For each workload: torchlosses, torch's own expression, and the formula in plain operations.
WORKLOADS: dict[str, tuple[Loss, Loss, Loss]] = {
    "squares, dense": (
        sum_squared_error,
        lambda y, t: F.mse_loss(y, t, reduction="sum") * 0.5,
        lambda y, t: (y.float() - t.float()).square().sum() / 2,
    ),
    "squares, index": (
        sum_squared_error,
        lambda y, c: F.mse_loss(y, one_hot(y, c), reduction="sum") * 0.5,
        lambda y, c: (y.float() - one_hot(y, c).float()).square().sum() / 2,
    ),
    "probabilities, dense": (
        cross_entropy_error,
        lambda y, t: -(t * (y + DELTA).log()).sum(),
        lambda y, t: -(t.float() * (y.float() + DELTA).log()).sum(),
    ),
    "probabilities, index": (
        cross_entropy_error,
        lambda y, c: F.nll_loss((y + DELTA).log(), c, reduction="sum"),
        lambda y, c: -(y.gather(1, c.unsqueeze(1)).float() + DELTA).log().sum(),
    ),
    "logits, index": (
        lambda x, c: cross_entropy_error(x, c, from_logits=True),
        lambda x, c: F.cross_entropy(x, c, reduction="sum"),
        lambda x, c: -(x.float().softmax(1).gather(1, c.unsqueeze(1)) + DELTA).log().sum(),
    ),
    "logits, dense": (
        lambda x, t: cross_entropy_error(x, t, from_logits=True),
        lambda x, t: F.cross_entropy(x, t, reduction="sum"),
        lambda x, t: -(t.float() * (x.float().softmax(1) + DELTA).log()).sum(),
    ),
}


def one_hot(y: Tensor, classes: Tensor) -> Tensor:
    return torch.zeros_like(y).scatter_(1, classes.unsqueeze(1), 1)


def arguments(
    workload: str, shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    input = torch.randn(shape, device=device)
    target = torch.randn(shape, device=device).softmax(1).to(dtype)
    if "logits" not in workload:
        input = input.softmax(1)
    if "index" in workload:
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    return input.to(dtype), target


def step(loss: Loss, input: Tensor, target: Tensor, upstream: float | None) -> Callable[[], Any]:
    """What is timed: the loss, or the loss and its gradient by the input."""
    if upstream is None:

        def forward() -> Any:
            with torch.no_grad():
                return loss(input, target)

        return forward
    leaf = input.clone().requires_grad_()

    def backward() -> Any:
        value = loss(leaf, target)
        return torch.autograd.grad(value, leaf, torch.full_like(value, upstream))

    return backward


def floor(
    workload: str, input: Tensor, target: Tensor, upstream: float | None
) -> Callable[[], Any]:
    """The same memory: each argument read once, the gradient allocated and written once."""
    reads = [target] if "dense" in workload else []
    if workload != "probabilities, index":
        reads.append(input)
    rows = max(2**19 // input[0].numel(), 1)

    def touch() -> Any:
        gradient = None if upstream is None else torch.empty_like(input)
        for start in range(0, len(input), rows):
            blocks = [read[start : start + rows] for read in reads]
            if gradient is None:
                for block in blocks:
                    block.sum()
            elif len(blocks) == 2:
                torch.add(*blocks, out=gradient[start : start + rows])
            elif blocks:
                torch.neg(*blocks, out=gradient[start : start + rows])
            else:
                gradient[start : start + rows] = 0
        return gradient

    return touch


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of what the call allocates."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        call()
    # The profiler's own summaries lack those of the autograd engine's thread.
    events = getattr(profiler.profiler, "kineto_results").events()  # noqa: B009
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(sizes), default=0)


def measure(
    workload: str, shape: Sequence[int], dtype: torch.dtype, upstream: float | None, options: Any
) -> dict[str, float]:
    """Median seconds of each contender, and the peak of memory of ours in input sizes."""
    input, target = arguments(workload, shape, dtype, options.device)
    ours, theirs, formula = WORKLOADS[workload]
    torch._dynamo.reset()
    contenders: dict[str, Callable[[], Callable[[], Any]]] = {
        "torchlosses": lambda: step(ours, input, target, upstream),
        "torch": lambda: step(theirs, input, target, upstream),
        "eager": lambda: step(formula, input, target, upstream),
        "compiled": lambda: step(torch.compile(formula), input, target, upstream),
        "floor": lambda: floor(workload, input, target, upstream),
    }
    timers, numbers, times = {}, {}, {}
    for name, make in contenders.items():
        try:
            call = make()
            call()
        except RuntimeError as error:
            print(f"  left out: {name} ({str(error).splitlines()[0]})")
            continue
        timers[name] = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        numbers[name] = max(int(0.02 / timers[name].timeit(3).mean), 1)
        times[name] = list[float]()
    for _, name in itertools.product(range(options.rounds), timers):
        times[name].append(timers[name].timeit(numbers[name]).mean)
    result = {name: statistics.median(values) for name, values in times.items()}
    memory = peak_memory(step(ours, input, target, upstream), options.device)
    return result | {"memory": memory / (input.numel() * input.element_size())}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [("workload", "shape", "dtype", "step", *RIVALS[:3], "of the floor", "memory", "ms")]
    for row in rows:
        ours = row["torchlosses"]
        ratios = (f"{row[name] / ours:.2f}x" if name in row else "-" for name in RIVALS[:3])
        over = f"{ours / row['floor']:.2f}x" if ours > 1e-3 else "-"
        start = (row["workload"], row["shape"], row["dtype"], row["step"])
        lines.append((*start, *ratios, over, f"{row['memory']:.2f}", f"{ours * 1e3:.3f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """For loss and gradient in float32: each rival's time over that of torchlosses."""
    rows = [row for row in rows if row["step"] == "backward" and row["dtype"] == rows[0]["dtype"]]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, grid = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, shape in zip(grid[0], shapes, strict=True):
        part = [row for row in rows if row["shape"] == shape]
        for index, name in enumerate(RIVALS):
            places = [place + 0.2 * index for place in range(len(part))]
            ratios = [row.get(name, 0) / row["torchlosses"] for row in part]
            axes.barh(places, ratios, 0.2, label=name)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks([place + 0.3 for place in range(len(part))], [r["workload"] for r in part])
        axes.set(title=shape.replace("x", " × "), xlabel="time over that of torchlosses")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()
    grid[0][-1].legend(fontsize=8)
    figure.suptitle(
        f"Loss and gradient, {rows[0]['dtype']}: right of the line torchlosses is faster"
    )
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxC")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument(
        "--rounds", type=int, default=9, help="times that each contender's turn comes"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    cells = list(
        itertools.product(options.dtypes, options.shapes, options.workloads, options.steps)
    )
    rows = []
    for number, (dtype, shape, workload, name) in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {workload}, {shape}, {dtype}, {name}", flush=True)
        sizes = [int(size) for size in shape.split("x")]
        result = measure(workload, sizes, getattr(torch, dtype), STEPS[name], options)
        row = {"workload": workload, "shape": shape, "dtype": dtype, "step": name}
        rows.append(row | result)
    columns = ("workload", "shape", "dtype", "step", "torchlosses", *RIVALS, "memory")
    with (options.output_dir / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.output_dir / "benchmark.png")
    print(table(rows))
    print(f"picture: {options.output_dir / 'benchmark.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
