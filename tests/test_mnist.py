"""The example trains, reports, resumes and fails as it says, mostly in processes of its own."""

import csv
import importlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the extra 'example' is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

BOTH = ("SumSquaredError", "CrossEntropyError")
# Nothing listens on the port of discard: a download that is tried fails at once.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
METRICS = ("test_accuracy", "test_loss", "train_loss_epoch")
BRIEF = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3")


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """A data directory with 320 training and 80 test images in the files of MNIST."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.pad(
        images.reshape(-1, 8, 8).repeat(2, 1).repeat(2, 2) * 15, ((0, 0), (6, 6), (6, 6))
    )
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, part in (("train", slice(320)), ("t10k", slice(320, 400))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            # Two zero bytes, the code of unsigned bytes, the number of dimensions, each size.
            header = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return tmp_path / "data"


def start(
    directory: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "mnist.py"), "--trainer.accelerator=cpu", *arguments],
        cwd=directory,
        # More threads of a network this small wait for each other, above all in several processes.
        env=os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def run(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    result = start(directory, *arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def accuracies(output: str) -> dict[str, float]:
    rows = re.findall(r"^(\w+Error) .* ([\d.]+)%", output, re.MULTILINE)
    return {loss: float(percent) / 100 for loss, percent in rows}


def checkpoint(output: str) -> str:
    files: list[str] = re.findall(r"^checkpoint: (.*)$", output, re.MULTILINE)
    return files[-1]


def processes(number: int) -> tuple[str, ...]:
    return (f"--trainer.devices={number}", "--trainer.strategy=ddp")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a training of one process in float32 prints."""
    return run(tmp_path_factory.mktemp("digits"), "--data=digits")


def assert_as_good(output: str, digits: str) -> None:
    # Of 360 test digits two networks of 98 % differ by 1 % (3.6 digits) at one standard deviation.
    expected = accuracies(digits)
    assert accuracies(output) == {loss: pytest.approx(expected[loss], abs=0.025) for loss in BOTH}


def test_trains_both_losses_on_mnist_files(tmp_path: Path, tiny_mnist: Path) -> None:
    out = run(tmp_path, "--data=mnist", f"--data-dir={tiny_mnist}", "--trainer.max_epochs=2")
    assert list(accuracies(out)) == list(BOTH)
    assert re.search(r"SumSquaredError +MNIST +2 ", out)
    picture = (tmp_path / "runs" / "mnist.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    for loss in BOTH:
        log = tmp_path / "runs" / loss / "version_0" / "metrics.csv"
        with log.open() as file:
            rows = list(csv.DictReader(file))
        assert sum(bool(row["test_accuracy"]) for row in rows) == 2


def test_learns_the_embedded_digits(digits: str) -> None:
    assert "MNIST" not in digits
    assert accuracies(digits) == {loss: pytest.approx(1, abs=0.03) for loss in BOTH}


def test_two_processes_learn_as_much_as_one(tmp_path: Path, digits: str) -> None:
    out = run(tmp_path, "--data=digits", *processes(2))
    assert_as_good(out, digits)
    # The first process alone reports.
    assert len(re.findall("^loss ", out, re.MULTILINE)) == 1
    assert out.count("picture: ") == 1
    logs = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("metrics.csv"))
    assert logs == [f"runs/{loss}/version_0/metrics.csv" for loss in sorted(BOTH)]


def test_three_processes_measure_what_one_does(tmp_path: Path, tiny_mnist: Path) -> None:
    """At a learning rate of 0, so the network is the same; 80 test digits are not three thirds."""
    metrics = []
    for number in (1, 3):
        out = tmp_path / str(number)
        run(
            tmp_path,
            "--data=mnist",
            f"--data-dir={tiny_mnist}",
            f"--output-dir={out}",
            "--trainer.max_epochs=1",
            "--model.lr=0",
            "--model.criterion=torchlosses.CrossEntropyError",
            "--model.criterion.reduction=mean",
            *processes(number),
        )
        with (out / "CrossEntropyError/version_0/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        metrics.append({name: [float(r[name]) for r in rows if r[name]][-1] for name in METRICS})
    one, three = metrics
    assert three["test_accuracy"] == one["test_accuracy"]
    assert three["test_loss"] == pytest.approx(one["test_loss"], rel=1e-6)
    # In training, each process draws its own dropout.
    assert three["train_loss_epoch"] == pytest.approx(one["train_loss_epoch"], rel=0.1)


def test_a_sum_over_several_processes_is_no_mean(tmp_path: Path) -> None:
    code = """if True:
        import lightning as L, mnist, torch, torchlosses
        model = mnist.Classifier(torchlosses.SumSquaredError()).eval()
        x, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
        for devices in (1, 3):
            model.trainer = L.Trainer(devices=devices, strategy="ddp", accelerator="cpu")
            loss, y = model.loss(x, labels)
            print((loss / model.criterion(y, labels)).item())
    """
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(EXAMPLES), *sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [float(factor) for factor in out.split()] == pytest.approx([1, 3])


def test_without_a_network_it_says_so_and_takes_the_digits(tmp_path: Path) -> None:
    out = run(tmp_path, *BRIEF)
    assert re.search("MNIST is not in 'data', and could not be downloaded.*1,797 digits", out)
    assert re.search(r"SumSquaredError +scikit-learn's 1,797 digits instead of MNIST +1 ", out)


def test_without_a_network_mnist_is_an_error(tmp_path: Path) -> None:
    result = start(tmp_path, "--data=mnist")
    assert result.returncode == 1
    assert re.search("--data mnist: MNIST is not in 'data', and could not be", result.stderr)
    assert "Traceback" not in result.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_network_that_never_answers_is_left_in_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.perf_counter()
        result = start(
            tmp_path, "--data=mnist", environment={"http_proxy": proxy, "https_proxy": proxy}
        )
        seconds = time.perf_counter() - begin
    assert result.returncode == 1
    assert "could not be downloaded" in result.stderr
    assert seconds < 60  # Some ten of them are imports; without a limit it would be for ever.


def test_resumes_and_reloads_with_its_criterion(tmp_path: Path, tiny_mnist: Path) -> None:
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
    with (tmp_path / "runs/CrossEntropyError/version_1/metrics.csv").open() as log:
        assert {row["epoch"] for row in csv.DictReader(log)} == {"1", "2"}

    result = start(tmp_path, f"--ckpt_path={file}")
    assert result.returncode == 2
    assert "--model.criterion" in result.stderr

    code = (
        "from mnist import Classifier; import sys;"
        "print(Classifier.load_from_checkpoint(sys.argv[1]).criterion)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "delta=0.001, from_logits=True" in out


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_lower_precision_learns_as_much(tmp_path: Path, precision: str, digits: str) -> None:
    result = start(tmp_path, "--data=digits", f"--trainer.precision={precision}")
    assert_as_good(result.stdout, digits)
    # What Lightning makes of 16-mixed on the CPU; float16 itself is in test_precision.py.
    is_replaced = "Using `precision='bf16-mixed'` instead" in result.stderr
    assert is_replaced == (precision == "16-mixed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_lower_precision_on_cuda(tmp_path: Path, precision: str, digits: str) -> None:
    options = ("--trainer.accelerator=cuda", f"--trainer.precision={precision}")
    assert_as_good(run(tmp_path, "--data=digits", *options), digits)


def test_takes_a_yaml_file(tmp_path: Path) -> None:
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


def test_takes_the_configuration_that_it_prints(tmp_path: Path) -> None:
    options = ("--data=digits", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
    (tmp_path / "my.yaml").write_text(run(tmp_path, *options, "--print_config"))
    out = run(tmp_path, "--config=my.yaml")
    for loss in BOTH:
        assert re.search(rf"{loss} +scikit-learn's 1,797 digits +15 ", out)


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
        importlib.import_module("mnist").main([argument])
    assert words in capsys.readouterr().err
