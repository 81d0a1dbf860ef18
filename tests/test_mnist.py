"""The example trains, reports, resumes and fails as documented.

Tests run it in their own process, except for those with two processes.
"""

import contextlib
import csv
import importlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the extra 'example' is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

BOTH = ("SumSquaredError", "CrossEntropyError")
# Nothing listens on port 9 (discard), so a download fails at once.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
METRICS = ("test_accuracy", "test_loss", "train_loss_epoch")
BRIEF = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
mnist: Any = importlib.import_module("mnist")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """With a network this small, more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def tiny_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with scikit-learn's digits in MNIST's format, 397 of them for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.pad(
        images.reshape(-1, 8, 8).repeat(2, 1).repeat(2, 2) * 15, ((0, 0), (6, 6), (6, 6))
    )
    data = tmp_path_factory.mktemp("mnist")
    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, part in (("train", slice(1400)), ("t10k", slice(1400, None))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            # Two zero bytes, the code of unsigned bytes, the number of dimensions, each size.
            header = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return data


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Lightning's, on workers, logging intervals, checkpoints and its own arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(directory: Path, *arguments: str) -> str:
    """Runs the script in this process and returns what it prints."""
    out = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(out), without_warnings():
        try:
            mnist.main(["--trainer.accelerator=cpu", *QUIET, *arguments])
        except SystemExit as exit:  # --print_config exits with status 0.
            if exit.code:
                raise
    return out.getvalue()


def run_two_processes(directory: Path, *arguments: str) -> str:
    """Runs the script, which starts a second process, and returns what it prints."""
    devices = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "mnist.py"), *devices, *arguments],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def accuracies(output: str) -> dict[str, float]:
    rows = re.findall(r"^(\w+Error) .* ([\d.]+)%", output, re.MULTILINE)
    return {loss: float(percent) / 100 for loss, percent in rows}


def checkpoint(output: str) -> str:
    files: list[str] = re.findall(r"^checkpoint: (.*)$", output, re.MULTILINE)
    return files[-1]


def metrics(directory: Path, loss: str, version: int = 0) -> list[dict[str, str]]:
    with (directory / loss / f"version_{version}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, tiny_mnist: Path) -> tuple[Path, str]:
    """The directory and the output of a run in one process, in float32."""
    directory = tmp_path_factory.mktemp("one_process")
    return directory, run(directory, *three_epochs(tiny_mnist))


def three_epochs(data: Path) -> tuple[str, ...]:
    return "--data=mnist", f"--data-dir={data}", "--trainer.max_epochs=3"


def assert_same_accuracy(output: str, expected: str, losses: Sequence[str] = BOTH) -> None:
    # The difference of two accuracies near 90 % on 397 digits has a standard deviation of 2 %.
    percent = accuracies(expected)
    assert accuracies(output) == {loss: pytest.approx(percent[loss], abs=0.05) for loss in losses}


def test_trains_both_losses_on_mnist_files(tmp_path: Path, tiny_mnist: Path) -> None:
    out = run(tmp_path, "--data=mnist", f"--data-dir={tiny_mnist}", "--trainer.max_epochs=2")
    assert list(accuracies(out)) == list(BOTH)
    assert re.search(r"SumSquaredError +MNIST +2 ", out)
    picture = (tmp_path / "runs" / "mnist.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    for loss in BOTH:
        assert sum(bool(row["test_accuracy"]) for row in metrics(tmp_path / "runs", loss)) == 2


def test_learns_scikit_learn_digits_with_the_configuration_that_it_prints(tmp_path: Path) -> None:
    half = "--trainer.limit_train_batches=0.5"
    (tmp_path / "my.yaml").write_text(run(tmp_path, "--data=digits", half, "--print_config"))
    out = run(tmp_path, "--config=my.yaml")
    assert len(re.findall(r"Error +scikit-learn's 1,797 digits +15 ", out)) == len(BOTH)
    assert "MNIST" not in out
    assert accuracies(out) == {loss: pytest.approx(1, abs=0.04) for loss in BOTH}


def test_two_processes_reach_and_report_the_accuracy_of_one(
    tmp_path: Path, tiny_mnist: Path, one_process: tuple[Path, str]
) -> None:
    """With an odd number of test digits, so that the processes have different numbers of them."""
    directory, expected = one_process
    out = run_two_processes(tmp_path, *three_epochs(tiny_mnist))
    assert_same_accuracy(out, expected)
    # Only the first process reports.
    assert len(re.findall("^loss ", out, re.MULTILINE)) == 1
    assert out.count("picture: ") == 1
    logs = [name for name in files(tmp_path) if name.endswith("metrics.csv")]
    assert logs == [f"runs/{loss}/version_0/metrics.csv" for loss in sorted(BOTH)]
    # The checkpoint names the class __main__.Classifier, as a script wrote it.
    with without_warnings():
        model = mnist.Classifier.load_from_checkpoint(tmp_path / checkpoint(out)).eval()
    assert type(model.criterion).__name__ == BOTH[-1]
    assert model.criterion.reduction == "batchmean"

    losses, shares = (
        {name: [float(row[name]) for row in rows if row[name]][-1] for name in METRICS}
        for rows in (metrics(folder / "runs", BOTH[-1]) for folder in (directory, tmp_path))
    )
    test = mnist.load("mnist", str(tiny_mnist)).test
    loss, y = model.loss(test.images, test.labels)
    accuracy = (y.argmax(1) == test.labels).float().mean()
    assert shares["test_accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)
    assert shares["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    # In training, each process draws its own dropout; a sum would be twice as large.
    assert shares["train_loss_epoch"] == pytest.approx(losses["train_loss_epoch"], rel=0.3)


def test_a_summed_loss_is_multiplied_by_the_number_of_processes() -> None:
    import lightning as L

    import torchlosses

    with without_warnings():
        model = mnist.Classifier(torchlosses.SumSquaredError()).eval()
    x, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    for devices in (1, 3):
        with without_warnings():
            model.trainer = L.Trainer(devices=devices, strategy="ddp", accelerator="cpu")
        loss, y = model.loss(x, labels)
        assert (loss / model.criterion(y, labels)).item() == pytest.approx(devices)


def test_auto_falls_back_to_scikit_learn_digits_without_a_network(tmp_path: Path) -> None:
    out = run(tmp_path, *BRIEF)
    assert re.search("MNIST is not in 'data', and could not be downloaded.*1,797 digits", out)
    assert re.search(r"SumSquaredError +scikit-learn's 1,797 digits instead of MNIST +1 ", out)


def test_data_mnist_is_an_error_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data mnist: MNIST is not in 'data', and could not be"):
        run(tmp_path, "--data=mnist")
    assert not (tmp_path / "runs").exists()


def test_download_times_out_if_a_server_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mnist.DOWNLOAD_TIMEOUT <= 5
    monkeypatch.setattr(mnist, "DOWNLOAD_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in OFFLINE:
            monkeypatch.setenv(name, proxy)
        start = time.perf_counter()
        with pytest.raises(SystemExit, match="could not be downloaded"):
            run(tmp_path, "--data=mnist")
    assert time.perf_counter() - start < 30  # Without a timeout it would wait forever.
    assert socket.getdefaulttimeout() is None


def test_checkpoints_resume_and_restore_the_criterion(
    tmp_path: Path, tiny_mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--data=mnist",
        f"--data-dir={tiny_mnist}",
        "--model.criterion=torchlosses.CrossEntropyError",
        "--model.criterion.from_logits=true",
        "--model.criterion.delta=0.001",
    )
    out = run(tmp_path, *options, "--trainer.max_epochs=1")
    assert list(accuracies(out)) == ["CrossEntropyError"]
    file = tmp_path / checkpoint(out)
    out = run(tmp_path, *options, "--trainer.max_epochs=3", f"--ckpt_path={file}")
    assert re.search(r"CrossEntropyError +MNIST +3 ", out)
    assert {row["epoch"] for row in metrics(tmp_path / "runs", "CrossEntropyError", 1)} == {
        "1",
        "2",
    }

    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, f"--ckpt_path={file}")
    assert "--model.criterion" in capsys.readouterr().err
    with without_warnings():
        criterion = mnist.Classifier.load_from_checkpoint(file).criterion
    assert "delta=0.001, from_logits=True" in str(criterion)


@pytest.mark.parametrize(
    ("precision", "loss"), [("bf16-true", "SumSquaredError"), ("16-mixed", "CrossEntropyError")]
)
def test_lower_precision_reaches_the_same_accuracy(
    tmp_path: Path, precision: str, loss: str, tiny_mnist: Path, one_process: tuple[Path, str]
) -> None:
    criterion = (f"--model.criterion=torchlosses.{loss}", "--model.criterion.reduction=batchmean")
    out = run(tmp_path, *three_epochs(tiny_mnist), f"--trainer.precision={precision}", *criterion)
    assert_same_accuracy(out, one_process[1], (loss,))


def test_lightning_replaces_float16_on_the_cpu_by_bfloat16() -> None:
    """float16 itself is tested in test_precision.py."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mnist.parse(["--trainer.accelerator=cpu", "--trainer.precision=16-mixed"])
    assert any("Using `precision='bf16-mixed'` instead" in str(each.message) for each in caught)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_lower_precision_on_cuda(
    tmp_path: Path, precision: str, tiny_mnist: Path, one_process: tuple[Path, str]
) -> None:
    cuda = ("--trainer.accelerator=cuda", f"--trainer.precision={precision}")
    assert_same_accuracy(run(tmp_path, *three_epochs(tiny_mnist), *cuda), one_process[1])


def test_reads_a_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "data: digits\n"
        "output_dir: elsewhere\n"
        "trainer: {max_epochs: 1, limit_train_batches: 2}\n"
        "model: {lr: 0.1, criterion: {class_path: torchlosses.SumSquaredError,"
        " init_args: {reduction: mean}}}\n"
    )
    out = run(tmp_path, "--config=my.yaml")
    assert list(accuracies(out)) == ["SumSquaredError"]
    file = torch.load(tmp_path / checkpoint(out), weights_only=True)
    assert file["hyper_parameters"]["lr"] == 0.1
    assert file["hyper_parameters"]["criterion"]["init_args"]["reduction"] == "mean"
    assert (tmp_path / "elsewhere" / "mnist.png").exists()


@pytest.mark.parametrize(
    "arguments", [("--trainer.max_epochs=0",), ("--trainer.limit_train_batches=0",)]
)
def test_runs_without_epochs_or_batches(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = run(tmp_path, "--data=digits", *arguments)
    for loss in BOTH:
        assert re.search(rf"{loss} +scikit-learn's 1,797 digits +0 +none ", out)
    assert out.count("checkpoint: none") == 2
    assert (tmp_path / "runs" / "mnist.png").exists()


@pytest.mark.parametrize("option", ["--trainer.logger=false", "--trainer.barebones=true"])
def test_writes_no_log_without_a_logger(tmp_path: Path, option: str) -> None:
    out = run(tmp_path, "--data=digits", *BRIEF, option)
    assert "picture: runs/mnist.png" in out
    others = [name for name in files(tmp_path) if not name.endswith(".ckpt")]
    assert others == ["runs/mnist.png"]


def test_uses_the_logger_of_the_command_line(tmp_path: Path) -> None:
    options = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger",
               "--trainer.logger.save_dir=mine", "--trainer.logger.name=log")  # fmt: skip
    run(tmp_path, "--data=digits", *BRIEF, *options)
    assert all(metrics(tmp_path / "mine", "log", version) for version in (0, 1))
    assert not (tmp_path / "runs" / "SumSquaredError").exists()


@pytest.mark.parametrize(
    ("name", "takes_logits"),
    [
        ("torch.nn.CrossEntropyLoss", True),
        ("torchlosses.CrossEntropyError", False),
        ("torchlosses.SumSquaredError", False),
        ("--model.criterion.from_logits=true", True),
    ],
)
def test_a_criterion_gets_logits_or_probabilities(name: str, takes_logits: bool) -> None:
    options = [f"--model.criterion={name}", "--model.criterion.reduction=mean"]
    if name.startswith("--"):
        options = ["--model.criterion=torchlosses.CrossEntropyError", *options[1:], name]
    with without_warnings():
        model = mnist.parse([*options, "--trainer.accelerator=cpu"]).model.eval()
    x, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    logits = model.network(x)
    loss, _ = model.loss(x, labels)
    y = logits if takes_logits else logits.softmax(1)
    torch.testing.assert_close(loss, model.criterion(y, labels))


def test_help_tells_how_to_list_the_options_of_a_criterion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    option = "--model.criterion.help torchlosses.CrossEntropyError"
    for arguments, words in ((["--help"], option), (option.split(), "label_smoothing")):
        with pytest.raises(SystemExit, match="0"):
            mnist.main(arguments)
        assert words in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--data=mnits", "mnits"),
        ("--trainer.max_epohcs=1", "max_epohcs"),
        ("--model.criterion=torchlosses.Nothing", "torchlosses.Nothing"),
        ("--model.criterion.reduction=mean", "criterion"),
        ("--model.lr=fast", "fast"),
    ],
)
def test_wrong_option(
    argument: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    with pytest.raises(SystemExit, match="2"):
        mnist.main([argument])
    assert words in capsys.readouterr().err
