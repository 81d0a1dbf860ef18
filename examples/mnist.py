"""Train a small network on handwritten digits with two losses of torchlosses, and compare them.

    python examples/mnist.py                         # both losses, 5 epochs each
    python examples/mnist.py --data digits           # without MNIST, on scikit-learn's 1,797 digits
    python examples/mnist.py --trainer.max_epochs 2 --trainer.precision bf16-mixed --model.lr 0.001
    python examples/mnist.py --model.criterion torchlosses.CrossEntropyError \
        --model.criterion.from_logits true           # one loss, with its options
    python examples/mnist.py --model.criterion.help torchlosses.CrossEntropyError
    python examples/mnist.py --trainer.devices 2 --trainer.strategy ddp --trainer.accelerator cpu
    python examples/mnist.py --print_config > my.yaml; python examples/mnist.py --config my.yaml

Several processes share each batch, so the batch size does not depend on their number. Logs, a
checkpoint for each loss and the picture `mnist.png` go to `runs/`. `--ckpt_path FILE` with the same
`--model.criterion` resumes a run. With `--trainer.logger false` there is no log, and the picture
shows no curves.
"""

import csv
import itertools
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import MNIST

from torchlosses import SumSquaredError

BOTH = ("torchlosses.SumSquaredError", "torchlosses.CrossEntropyError")
DOWNLOAD_TIMEOUT = 5.0  # Seconds; torchvision sets no timeout.
DIGITS = "scikit-learn's 1,797 digits"


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory, which give a whole batch by one indexing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def no_collate(batch: Any) -> Any:
    """The batch itself, since `Images` returns whole batches."""
    return batch


class Data(L.LightningDataModule):
    """Training and test images, with a batch size and a number of epochs for their number."""

    name: str

    def __init__(
        self, name: str, train: Images, test: Images, batch_size: int, max_epochs: int
    ) -> None:
        super().__init__()
        self.name = name
        self.train = train
        self.test = test
        self.batch_size = batch_size
        self.max_epochs = max_epochs

    def loader(self, images: Images, batch_size: int, **options: Any) -> DataLoader[Any]:
        """A loader of this process's share of each batch."""
        trainer: Any = self.trainer
        share = max(batch_size // trainer.world_size, 1)
        return DataLoader(images, share, collate_fn=no_collate, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        own = slice(trainer.global_rank, None, trainer.world_size)
        test = Images(self.test.images[own], self.test.labels[own])
        # Lightning's default sampler would repeat digits to make the shares equal.
        sampler: Any = DistributedSampler(test, num_replicas=1, rank=0, shuffle=False)
        return self.loader(test, 500, sampler=sampler)


def load(data: str, data_dir: str) -> Data:
    """MNIST from `data_dir` or by download; with "auto", scikit-learn's digits if both fail."""
    if data == "digits":
        return load_scikit_learn_digits()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return load_mnist(data_dir)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        message = f"MNIST is not in {data_dir!r}, and could not be downloaded ({reason})"
        if data == "mnist":
            raise SystemExit(f"--data mnist: {message}") from error
        if is_first_process():
            print(f"{message}: training on {DIGITS} instead.", flush=True)
        digits = load_scikit_learn_digits()
        digits.name = f"{DIGITS} instead of MNIST"
        return digits
    finally:
        socket.setdefaulttimeout(timeout)


def is_first_process() -> bool:
    """Whether this process starts the others, which it does when training starts."""
    return getattr(rank_zero_only, "rank", 0) == 0


def load_mnist(data_dir: str) -> Data:
    splits = (MNIST(data_dir, train, download=is_first_process()) for train in (True, False))
    train, test = (Images(split.data[:, None].float() / 255, split.targets) for split in splits)
    return Data("MNIST", train, test, batch_size=64, max_epochs=5)


def load_scikit_learn_digits() -> Data:
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.view(-1, 1, 8, 8).float() / 16
    images = nn.functional.interpolate(images, (20, 20), mode="bilinear")
    images = nn.functional.pad(images, (4, 4, 4, 4))  # MNIST's margin.
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    train, test = Images(train_images, train_labels), Images(test_images, test_labels)
    return Data(DIGITS, train, test, batch_size=32, max_epochs=15)


class Classifier(L.LightningModule):
    """Two convolutions and two linear layers, trained with any criterion.

    Args:
        criterion: the loss; `--model.criterion.help torchlosses.CrossEntropyError` lists its
            options. Without one, the script trains with both losses in turn. SumSquaredError and
            losses whose `from_logits` is false get probabilities, other losses get logits.
        lr: the initial learning rate of Adam, which decays linearly to 0.
    """

    def __init__(self, criterion: nn.Module | None = None, lr: float = 0.002) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.criterion: Any = criterion
        self.lr = lr
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
        self.test_loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """The probabilities of the ten digits."""
        probabilities: Tensor = self.network(images).softmax(1)
        return probabilities

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        probabilities = logits.softmax(1)
        is_squares = isinstance(self.criterion, SumSquaredError)
        from_logits = getattr(self.criterion, "from_logits", not is_squares)
        loss = self.criterion(logits if from_logits else probabilities, labels)
        if getattr(self.criterion, "reduction", None) == "sum":
            # Averaging the gradients over the processes divides the sum by their number.
            loss = loss * self.trainer.world_size
        return loss, probabilities

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss, _ = self.loss(*batch)
        self.log("train_loss", loss, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss, probabilities = self.loss(*batch)
        # Metrics, because Lightning's own mean rounds the average batch size of the processes.
        self.test_loss(loss, len(batch[1]))
        self.accuracy(probabilities, batch[1])
        self.log("test_loss", self.test_loss)
        self.log("test_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = max(self.trainer.estimated_stepping_batches, 1)
        schedule = LambdaLR(optimizer, lambda step: max(1 - step / steps, 0))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class CLI(LightningCLI):
    """Lightning's command line, with data sets by name instead of a class."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--data",
            type=Literal["auto", "mnist", "digits"],
            default="auto",
            help=f"MNIST, {DIGITS}, or (auto) MNIST if it can be loaded, else the digits",
        )
        parser.add_argument("--data-dir", default="data", help="folder of MNIST or its download")
        parser.add_argument("--output-dir", default="runs", help="for logs, checkpoints, picture")
        parser.add_argument("--ckpt_path", type=str | None, help="a checkpoint to resume from")
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults({"trainer.num_sanity_val_steps": 0})
        parser.add_lightning_class_args(Classifier, "model")

    def before_instantiate_classes(self) -> None:
        options = self.config.trainer
        options.default_root_dir = options.default_root_dir or self.config.output_dir
        if options.logger is False or options.barebones:
            self.save_config_callback = None  # It writes to the log's folder.


def parse(arguments: Sequence[str]) -> CLI:
    return CLI(Classifier, run=False, seed_everything_default=1, args=list(arguments))


def train(cli: CLI, data: Data) -> dict[str, Any]:
    """Trains, and returns what the table and the picture show."""
    name = type(cli.model.criterion).__name__
    options = cli.config.trainer
    if options.logger in (None, True) and not options.barebones:
        cli.trainer.logger = CSVLogger(cli.config.output_dir, name)
    start = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=data, ckpt_path=cli.config.ckpt_path)
    seconds = time.perf_counter() - start
    accuracy = cli.trainer.callback_metrics.get("test_accuracy")
    metrics = []
    log = cli.trainer.logger
    if isinstance(log, CSVLogger) and cli.trainer.is_global_zero:  # Only the first process writes.
        path = Path(log.log_dir, "metrics.csv")
        if path.exists():  # Missing if nothing was logged.
            with path.open() as file:
                metrics = list(csv.DictReader(file))
    return {
        "loss": name,
        "epochs": cli.trainer.current_epoch,
        "accuracy": "none" if accuracy is None else f"{float(accuracy):.2%}",
        "seconds": seconds,
        "checkpoint": getattr(cli.trainer.checkpoint_callback, "best_model_path", "") or "none",
        "model": cli.model.cpu().float().eval(),
        "metrics": metrics,
    }


def table(runs: list[dict[str, Any]], data: Data) -> str:
    rows = [("loss", "data", "epochs", "test accuracy", "seconds")]
    for run in runs:
        epochs, seconds = str(run["epochs"]), f"{run['seconds']:.0f}"
        rows.append((run["loss"], data.name, epochs, run["accuracy"], seconds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def draw(runs: list[dict[str, Any]], data: Data, path: Path) -> None:
    """A column for each loss: its learning curves, and digits that the network gets wrong."""
    figure = plt.figure(figsize=(5.2 * len(runs), 4.6), layout="constrained")
    figure.suptitle(f"Data: {data.name}")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    plots = parts[0].subplots(1, len(runs), squeeze=False)
    columns = parts[1].subfigures(1, len(runs), squeeze=False)
    for run, axes, column in zip(runs, plots[0], columns[0], strict=True):
        draw_curves(axes, run)
        draw_mistakes(column.subplots(1, 5), run, data.test)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(axes: Axes, run: dict[str, Any]) -> None:
    for metric, style, label in (
        ("train_loss_epoch", "o-", "training"),
        ("test_loss", "s--", "test"),
    ):
        rows = [row for row in run["metrics"] if row.get(metric)]
        epochs = [int(row["epoch"]) + 1 for row in rows]
        axes.plot(epochs, [float(row[metric]) for row in rows], style, label=label)
    axes.set_title(f"{run['loss']}: test accuracy {run['accuracy']}", fontsize=11)
    reduction = getattr(run["model"].criterion, "reduction", "")
    axes.set(xlabel="epoch", ylabel=f"loss ({reduction})" if reduction else "loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def draw_mistakes(grid: Sequence[Axes], run: dict[str, Any], test: Images) -> None:
    with torch.inference_mode():
        probabilities = torch.cat([run["model"](images) for images in test.images.split(500)])
    wrong = (probabilities.argmax(1) != test.labels).nonzero().flatten().tolist()
    for axes, index in itertools.zip_longest(grid, wrong[: len(grid)]):
        axes.set_axis_off()
        if index is None:
            continue
        axes.imshow(test.images[index, 0], cmap="gray_r")
        label, predicted = int(test.labels[index]), int(probabilities[index].argmax())
        shares = (f"{digit}: {probabilities[index, digit]:.0%}" for digit in (predicted, label))
        axes.set_title(f"a {label}, taken for {predicted}\n" + ", ".join(shares), fontsize=8)


def main(arguments: Sequence[str]) -> None:
    cli = parse(arguments)
    options = cli.config
    if options.ckpt_path and options.model.criterion is None:
        cli.parser.error("--ckpt_path resumes with one loss: name it with --model.criterion")
    data = load(options.data, options.data_dir)
    criteria: Sequence[Sequence[str]] = [()]
    if options.model.criterion is None:
        criteria = [
            (f"--model.criterion={c}", "--model.criterion.reduction=batchmean") for c in BOTH
        ]
    epochs = options.trainer.max_epochs
    if epochs is None:
        epochs = data.max_epochs
    runs = []
    for criterion in criteria:
        cli = parse((*arguments, *criterion, f"--trainer.max_epochs={epochs}"))
        runs.append(train(cli, data))
    if cli.trainer.is_global_zero:
        picture = Path(options.output_dir, "mnist.png")
        draw(runs, data, picture)
        print(table(runs, data), *(f"checkpoint: {run['checkpoint']}" for run in runs), sep="\n")
        print(f"picture: {picture}")


if __name__ == "__main__":
    # The data are in memory: worker processes would only copy them.
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    main(sys.argv[1:])
