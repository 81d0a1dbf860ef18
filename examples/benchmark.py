"""Measure the time and memory of the losses, relative to torch's own losses and to a memory bound.

    python examples/benchmark.py                          # every workload, both malloc settings
    python examples/benchmark.py --shapes 4096x8192 --dtypes float32 --rounds 15
    python examples/benchmark.py --device cuda --steps backward "backward of 0.5" --rounds 5

The contenders of a workload take turns, so that a drift in the machine's speed affects all alike.
The columns of the table, all of medians:

- "torch" to "quack": time relative to torchlosses (above 1: torchlosses is faster). "torch" is
  torch's own loss, "eager" the formula in torch operations, "compiled" that formula under
  torch.compile, "torch compiled" torch's loss under torch.compile, "ours compiled" torchlosses in a
  compiled graph. Liger-Kernel and quack, if installed, compute logits with class indices.
- "both compiled": torch's loss relative to torchlosses, both under torch.compile.
- "of the floor": time of torchlosses relative to the floor, which reads each argument once, and
  allocates and writes the gradient once, in pages like those of torchlosses.
- "memory": peak of the bytes allocated beyond the arguments, relative to the bytes of the input.
- "ms", "GB/s": time of torchlosses, and the bytes of the floor per second of that time.
- "of copy": these GB/s relative to those of a plain copy.

A CSV of all times and a picture go to `runs/`.

On the CPU everything is measured twice, in new processes. With malloc "default" the C library
returns large freed blocks to the system, so each new tensor pays for fresh pages. With "kept", set
by two environment variables, it reuses freed memory, so the times are those of the losses.

--linear measures the linear loss with its gradients by input and weight, relative to the layer
followed by torch's loss ("plain"), torch's linear loss ("chunked") and Liger's:

    python examples/benchmark.py --linear --malloc kept
    python examples/benchmark.py --linear --device cuda --shapes 8192x4096x128256

Its "MB" columns are the peak of the bytes that each contender allocates beyond the arguments.

On CUDA, times are taken between two events on the device, with its cache flushed before. Workloads
too small to fill the device are bound by the host and timed on the host, as on the CPU.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import itertools
import os
import statistics
import subprocess
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

from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

DELTA = 1e-7
SHAPES = {
    "cpu": ("64x10", "1024x1000", "4096x8192", "16x21x256x256"),
    "cuda": (
        "128x10", "65536x10", "8192x8192", "8192x32000", "16x21x512x512",
        "16384x1000", "16384x4096", "16384x32768", "16384x131072",
    ),
}  # fmt: skip
SMALL = 2**20  # Bytes of an input up to which CUDA times are bound by the host.
DTYPES = ("float32", "bfloat16", "float64")
STEPS = {"forward": None, "backward": 1.0, "backward of 0.5": 0.5}  # Names and upstream gradients.
# Other libraries' cross-entropy of logits (N, C) with class indices. Liger's overwrites the logits.
PEERS = {
    "liger": ("liger_kernel.transformers.functional", "liger_cross_entropy"),
    "quack": ("quack.cross_entropy", "cross_entropy"),
}
# Environment variables of the C library: sizes from which freed memory returns to the system.
MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "kept": {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"},
}
NAMES = ("workload", "shape", "dtype", "step", "malloc")
RIVALS = ("torch", "eager", "compiled", "torch compiled", "ours compiled", *PEERS, "floor")

Loss = Callable[[Tensor, Tensor], Tensor]


# For each workload: torchlosses, torch's own loss, and the formula in torch operations.
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
        lambda x, c: cross_entropy_error(x, c, from_logits=True, delta=0),
        lambda x, c: F.cross_entropy(x, c, reduction="sum"),
        lambda x, c: -x.float().log_softmax(1).gather(1, c.unsqueeze(1)).sum(),
    ),
    "logits, index, guarded mean": (
        lambda x, c: cross_entropy_error(x, c, from_logits=True, reduction="mean"),
        lambda x, c: F.cross_entropy(x, c),
        lambda x, c: -(x.float().softmax(1).gather(1, c.unsqueeze(1)) + DELTA).log().mean(),
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
    """The call to time: the loss, or the loss and its gradient by the input."""
    if upstream is None:

        def forward() -> Any:
            with torch.no_grad():
                return loss(input, target)

        return forward
    leaf = input.detach().requires_grad_()

    def backward() -> Any:
        value = loss(leaf, target)
        return torch.autograd.grad(value, leaf, torch.full_like(value, upstream))

    return backward


def peer(name: str) -> Loss:
    module, function = PEERS[name]
    loss: Callable[..., Tensor] = getattr(importlib.import_module(module), function)
    return lambda x, c: loss(x, c, reduction="sum")


def read_once(workload: str, input: Tensor, target: Tensor) -> list[Tensor]:
    """The arguments of the input's size of which the loss reads every element."""
    reads = [target] if "dense" in workload else []
    return reads if workload == "probabilities, index" else [*reads, input]


def floor(reads: list[Tensor], input: Tensor, upstream: float | None) -> Callable[[], Any]:
    """Reads each argument once, and allocates and writes the gradient once."""
    rows = len(input) if input.is_cuda else max(2**19 // input[0].numel(), 1)
    empty = torch.empty_like
    if input.is_cpu:
        with contextlib.suppress(
            ImportError
        ):  # Without the extension torchlosses uses plain pages.
            empty = importlib.import_module("torchlosses.kernels.cpu").empty

    def touch() -> Any:
        gradient = None if upstream is None else empty(input)
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


def turn(call: Callable[[], Any], *, on_device: bool) -> Callable[[], float]:
    """A function that returns the seconds per call, for one turn of a contender."""
    if on_device:
        from triton.testing import do_bench

        return lambda: do_bench(call, warmup=5, rep=50, return_mode="median") / 1e3
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    number = max(int(0.02 / timer.timeit(3).mean), 1)
    return lambda: timer.timeit(number).mean


def copy_bandwidth(device: str) -> float:
    """Bytes that a copy reads and writes per second."""
    source = torch.ones(2**26, device=device)
    copy = torch.empty_like(source)
    seconds = turn(lambda: copy.copy_(source), on_device=device == "cuda")
    return 2 * source.nbytes / statistics.median(seconds() for _ in range(5))


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Peak of the bytes that the call allocates."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        call()
    # The profiler's own summaries lack allocations of the autograd engine's thread.
    events = getattr(profiler.profiler, "kineto_results").events()  # noqa: B009
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(sizes), default=0)


def measure(
    workload: str, shape: Sequence[int], dtype: torch.dtype, upstream: float | None, options: Any
) -> dict[str, float]:
    """Median seconds of each contender, bytes of the floor, and peak memory of torchlosses."""
    input, target = arguments(workload, shape, dtype, options.device)
    ours, theirs, formula = WORKLOADS[workload]
    reads = read_once(workload, input, target)
    torch._dynamo.reset()
    contenders: dict[str, Callable[[], Loss]] = {
        "torchlosses": lambda: ours,
        "torch": lambda: theirs,
        "eager": lambda: formula,
        "compiled": lambda: torch.compile(formula),
        "torch compiled": lambda: torch.compile(theirs),
        "ours compiled": lambda: torch.compile(ours),
    }
    if workload == "logits, index" and len(shape) == 2:
        contenders |= {name: functools.partial(peer, name) for name in PEERS}
    on_device = options.device == "cuda" and input.nbytes > SMALL
    turns = {"floor": turn(floor(reads, input, upstream), on_device=on_device)}
    for name, make in contenders.items():
        try:
            own = input.clone() if name in PEERS else input  # A peer may overwrite its input.
            call = step(make(), own, target, upstream)
            call()
        except Exception as error:  # A contender that fails must not end a long run.
            print(
                f"  left out: {name} ({next(iter(str(error).splitlines()), type(error).__name__)})"
            )
            continue
        turns[name] = turn(call, on_device=on_device)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _, name in itertools.product(range(options.rounds), turns):
        times[name].append(turns[name]())
    result = {name: statistics.median(values) for name, values in times.items()}
    memory = peak_memory(step(ours, input, target, upstream), options.device)
    written = 0 if upstream is None else input.nbytes
    return result | {
        "memory": memory / input.nbytes,
        "bytes": sum(read.nbytes for read in reads) + written,
    }


def table(rows: list[dict[str, Any]]) -> str:
    *rivals, floor = RIVALS
    lines = [
        (*NAMES, *rivals, "both compiled", f"of the {floor}", "memory", "ms",
         "GB/s", "of copy")
    ]  # fmt: skip
    for row in rows:
        ours = row["torchlosses"]
        ratios = (f"{row[name] / ours:.2f}x" if name in row else "-" for name in rivals)
        both = "-"
        if "torch compiled" in row and "ours compiled" in row:
            both = f"{row['torch compiled'] / row['ours compiled']:.2f}x"
        over = f"{ours / row[floor]:.2f}x" if row["bytes"] > SMALL else "-"
        bandwidth = row["bytes"] / ours
        start = tuple(row[name] for name in NAMES)
        end = (f"{bandwidth / 1e9:.1f}", f"{bandwidth / row['copy']:.2f}")
        lines.append(
            (*start, *ratios, both, over, f"{row['memory']:.2f}", f"{ours * 1e3:.3f}", *end)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of each rival's time relative to torchlosses, for loss and gradient."""
    last = rows[-1]  # With malloc "kept", if both settings were measured.
    rows = [
        row
        for row in rows
        if row["step"] == "backward"
        and all(row[name] == last[name] for name in ("dtype", "malloc"))
    ]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    rivals = [name for name in RIVALS if any(name in row for row in rows)]
    figure, grid = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, shape in zip(grid[0], shapes, strict=True):
        part = [row for row in rows if row["shape"] == shape]
        for index, name in enumerate(rivals):
            positions = [group + 0.8 / len(rivals) * index for group in range(len(part))]
            ratios = [row.get(name, 0) / row["torchlosses"] for row in part]
            axes.barh(positions, ratios, 0.8 / len(rivals), label=name)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks([group + 0.3 for group in range(len(part))], [r["workload"] for r in part])
        axes.set(title=shape.replace("x", " × "), xlabel="time relative to torchlosses")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()
    grid[0][-1].legend(fontsize=8)
    figure.suptitle(
        f"Loss and gradient, {last['dtype']}, malloc {last['malloc']} "
        "(right of the line: torchlosses is faster)"
    )
    figure.savefig(path, dpi=100)


def measure_all(options: argparse.Namespace, malloc: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    copy = copy_bandwidth(options.device)
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"cpu, {torch.get_num_threads()} threads, malloc {malloc}"
    print(f"torch {torch.__version__}, {machine}, copy {copy / 1e9:.1f} GB/s")
    shapes = options.shapes or SHAPES[options.device]
    cells = list(itertools.product(options.dtypes, shapes, options.workloads, options.steps))
    rows = []
    for number, (dtype, shape, workload, name) in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {workload}, {shape}, {dtype}, {name}", flush=True)
        sizes = [int(size) for size in shape.split("x")]
        result = measure(workload, sizes, getattr(torch, dtype), STEPS[name], options)
        row = {"workload": workload, "shape": shape, "dtype": dtype, "step": name}
        rows.append(row | {"malloc": malloc, "copy": copy} | result)
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {name: value if name in NAMES else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    columns = (*NAMES, "torchlosses", *RIVALS, "memory", "bytes", "copy")
    columns = tuple(dict.fromkeys(itertools.chain(columns, *rows)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# ---- The linear loss

LINEAR_SHAPES = {  # Rows, features, classes.
    "cpu": ("8192x256x10000", "4096x512x32000"),
    "cuda": ("8192x4096x32000", "8192x4096x128256"),
}
LINEAR_DTYPES = ("float32", "bfloat16")
LINEAR_WORKLOADS = ("index", "index, half ignored", "soft, a quarter of the rows")


def linear_arguments(
    workload: str, shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = shape
    if "soft" in workload:  # The target is as large as the logits.
        rows = max(rows // 4, 1)
        target = torch.randn(rows, classes, device=device).softmax(1).to(dtype)
    else:
        target = torch.randint(classes, (rows,), device=device)
    if "ignored" in workload:
        target[torch.rand(rows, device=device) < 0.5] = -100
    input = torch.randn(rows, features, device=device).to(dtype)
    weight = (torch.randn(classes, features, device=device) / features**0.5).to(dtype)
    return input.requires_grad_(), weight.requires_grad_(), target


def linear_contenders(target: Tensor) -> dict[str, Callable[..., Tensor]]:
    contenders: dict[str, Callable[..., Tensor]] = {
        "torchlosses": lambda x, w, t: linear_cross_entropy_error(x, w, t, reduction="mean"),
        "plain": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        contenders["chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    if not target.is_floating_point():
        with contextlib.suppress(ImportError):
            liger: Any = importlib.import_module(PEERS["liger"][0])
            contenders["liger"] = liger.liger_fused_linear_cross_entropy
    return contenders


def measure_linear(
    workload: str, shape: Sequence[int], dtype: torch.dtype, options: Any
) -> dict[str, float]:
    """Median seconds and peak megabytes of each contender."""
    x, w, t = linear_arguments(workload, shape, dtype, options.device)
    turns: dict[str, Callable[[], float]] = {}
    result: dict[str, float] = {}
    for name, loss in linear_contenders(t).items():

        def call(loss: Callable[..., Tensor] = loss) -> Any:
            return torch.autograd.grad(loss(x, w, t), (x, w))

        try:
            call()
            result[f"{name} MB"] = peak_memory(call, options.device) / 1e6
        except Exception as error:  # A contender that fails must not end a long run.
            print(f"  left out: {name} ({type(error).__name__})")
            continue
        if options.device == "cuda":
            turns[name] = turn(call, on_device=True)
        else:
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            turns[name] = functools.partial(lambda timer: timer.timeit(1).mean, timer)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _, name in itertools.product(range(options.rounds), turns):
        times[name].append(turns[name]())
    return {name: statistics.median(values) for name, values in times.items()} | result


def measure_linears(options: argparse.Namespace, malloc: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    shapes = options.shapes or LINEAR_SHAPES[options.device]
    dtypes = [dtype for dtype in options.dtypes if dtype in LINEAR_DTYPES]
    rows = []
    for dtype, shape, workload in itertools.product(dtypes, shapes, LINEAR_WORKLOADS):
        print(f"linear, {workload}, {shape}, {dtype}", flush=True)
        sizes = [int(size) for size in shape.split("x")]
        row = {"workload": workload, "shape": shape, "dtype": dtype, "step": "backward"}
        result = measure_linear(workload, sizes, getattr(torch, dtype), options)
        rows.append(row | {"malloc": malloc} | result)
    return rows


def linear_table(rows: list[dict[str, Any]]) -> str:
    names = ("torchlosses", "plain", "chunked", "liger")
    lines = [("workload", "shape", "dtype", "malloc", *names[1:], *(f"{n} MB" for n in names), "s")]
    for row in rows:
        ours = row["torchlosses"]
        ratios = [f"{row[name] / ours:.2f}x" if name in row else "-" for name in names[1:]]
        sizes = [f"{row[f'{n} MB']:.0f}" if f"{n} MB" in row else "-" for n in names]
        start = (row["workload"], row["shape"], row["dtype"], row["malloc"])
        lines.append((*start, *ratios, *sizes, f"{ours:.3f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ---- Command line


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=SHAPES)
    parser.add_argument(
        "--linear", action="store_true", help="measure the linear loss, with shapes NxDxC"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NxC")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--malloc", nargs="+", default=list(MALLOC), choices=MALLOC)
    parser.add_argument("--rounds", type=int, default=9, help="number of turns of each contender")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda":
        options.malloc = ["default"]
    rows: list[dict[str, Any]] = []
    for malloc in options.malloc:
        path = options.output_dir / f"{'linear-' * options.linear}{malloc}.csv"
        if len(options.malloc) == 1 and MALLOC[malloc].items() <= os.environ.items():
            rows = (measure_linears if options.linear else measure_all)(options, malloc)
            write(rows, path)
        else:  # The C library reads its environment once, when a process starts.
            command = (sys.executable, __file__, *arguments, "--malloc", malloc)
            environment = os.environ | MALLOC[malloc]
            subprocess.run(command, env=environment, check=True)  # noqa: S603 - It is this file.
            rows += read(path)
    if options.linear:
        print(linear_table(rows))
        return
    if len(options.malloc) > 1:
        write(rows, options.output_dir / "benchmark.csv")
    draw(rows, options.output_dir / "benchmark.png")
    print(table(rows))
    print(f"picture: {options.output_dir / 'benchmark.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
