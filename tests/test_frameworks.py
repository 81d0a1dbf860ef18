"""Every recipe in `examples/frameworks.md` gives the loss of all samples at once.

The tests run the document's code and check its figures. The identities in `examples/migration.md`
run as doctests. Tests of frameworks that are not installed are skipped; the extra `frameworks`
installs all of them.
"""

import copy
import doctest
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchlosses import CrossEntropyError, SumSquaredError
from torchlosses.checks import Reduction
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Frameworks warn of each other.

EXAMPLES = Path(__file__).parents[1] / "examples"


def sections(name: str) -> dict[str, str]:
    """The text under each heading."""
    text = (EXAMPLES / name).read_text("utf-8")
    _, *parts = re.split(r"^##+ (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


SECTIONS = sections("frameworks.md")
MIGRATION = sections("migration.md")
README = sections("../README.md")
START = "The names below"  # Names that all recipes use.
HALF = "Who has the factor ½"  # The same for the identities.


def run(*titles: str, replace: dict[str, str] | None = None, **names: Any) -> SimpleNamespace:
    """Runs the code of these sections, after that of START and with `names`; returns its names."""
    scope: dict[str, Any] = {"__name__": "recipe"}
    torch.manual_seed(0)
    for title in (START, *titles):
        blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], re.DOTALL | re.MULTILINE)
        code = "\n".join(blocks)
        if title == START:
            exec(code, scope)  # noqa: S102
            scope |= names
            continue
        for old, new in (replace or {}).items():
            assert old in code
            code = code.replace(old, new)
        exec(compile(code, f"frameworks.md: {title}", "exec"), scope)  # noqa: S102
    return SimpleNamespace(**scope)


def assert_states(title: str, *figures: str) -> None:
    """The section contains these figures."""
    text = " ".join(SECTIONS[title].split())
    matches = [re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", text) for figure in figures]
    assert [figure for figure, match in zip(figures, matches, strict=True) if not match] == []


def mean(
    network: Callable[..., Tensor], x: Any, t: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """The loss of all samples at once."""
    return cross_entropy_error(network(x), t, from_logits=True, delta=0, reduction=reduction)


def with_ignored_labels(names: SimpleNamespace) -> dict[str, Any]:
    """Labels and loader of the document, with 20 labels ignored in the first batch."""
    t = names.t.clone()
    t[:20] = -100
    return {"t": t, "loader": DataLoader(TensorDataset(names.x, t), batch_size=32)}


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def gradients_of_step(before: nn.Module, after: nn.Module, lr: float = 0.5) -> list[Tensor]:
    """The gradients of a step of SGD without momentum."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [(old - new).detach() / lr for old, new in pairs]


def ratio(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of `found` divided by that of `wanted`."""
    norms = [torch.cat([g.flatten() for g in tensors]).norm() for tensors in (found, wanted)]
    return float(norms[0] / norms[1])


def close(
    found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6, equal_nan: bool = False
) -> None:
    """Compares tensors, NumPy arrays and numbers of any dtype."""
    if isinstance(wanted, Tensor):
        found, wanted = torch.as_tensor(found), wanted.detach()
    torch.testing.assert_close(
        found, wanted, rtol=rtol, atol=atol, equal_nan=equal_nan, check_dtype=False
    )


@pytest.fixture(autouse=True)
def _isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs on one CPU thread and in a temporary folder, and destroys process groups afterwards."""
    for name, value in {
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "KERAS_BACKEND": "torch",
        "KERAS_TORCH_DEVICE": "cpu",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The networks are small.
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def reset_accelerate() -> None:
    """accelerate keeps its settings in global state."""
    state = pytest.importorskip("accelerate.state")
    for shared in (state.AcceleratorState, state.GradientState, state.PartialState):
        shared._reset_state()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """Makes `TrainingArguments` for one step over 4 batches of 6 samples."""
    transformers = pytest.importorskip("transformers")
    reset_accelerate()

    def make(**options: Any) -> Any:
        defaults = {
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 4,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return transformers.TrainingArguments(str(tmp_path / "trainer"), **(defaults | options))

    return make


def logged(trainer: Any) -> float:
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def test_transformers(arguments: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = transformers.BertForSequenceClassification(config)
    before = copy.deepcopy(model)
    ids, t = torch.randint(50, (24, 8)), torch.arange(24) % 3
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, t, strict=True)]
    names = run("transformers", model=model, arguments=arguments(), data=data)
    whole = mean(lambda ids: before(ids).logits, ids, t)
    wanted = gradients(before, whole)
    close(logged(names.trainer), whole)
    close(gradients_of_step(before, model, lr=1), wanted)

    def train(
        reduction: Any,
        criterion_options: dict[str, Any] | None = None,
        trainer: Any = transformers.Trainer,
        divide: bool = False,
        **options: Any,
    ) -> tuple[float, list[Tensor]]:
        model = copy.deepcopy(before)
        criterion = CrossEntropyError(
            from_logits=True, delta=0, reduction=reduction, **(criterion_options or {})
        )
        trainer = trainer(
            model,
            arguments(**options),
            train_dataset=data,
            compute_loss_func=lambda y, t, num_items_in_batch: (
                criterion(y.logits, t) / (num_items_in_batch if divide else 1)
            ),
        )
        trainer.train()
        return logged(trainer), gradients_of_step(before, model, lr=1)

    loss, step = train("mean")
    assert_states(
        "transformers", f"{loss:.3f} for {whole:.3f}", f"gives {ratio(step, wanted):.0f} times"
    )
    loss, step = train("sum")
    assert loss / whole.item() == pytest.approx(ratio(step, wanted))
    assert_states("transformers", f"an undivided sum {ratio(step, wanted):.0f} times")
    _, step = train("sum", max_grad_norm=1.0)
    assert ratio(step, [torch.ones(1)]) == pytest.approx(1, rel=1e-4)

    class OfMeans(transformers.Trainer):  # type: ignore[misc, name-defined]
        loss_is_scaled_for_ga = False

    loss, step = train("mean", trainer=OfMeans)
    close(loss, whole)
    close(step, wanted)

    loss, _ = train("sum", {"ignore_index": 0}, divide=True)
    expected = cross_entropy_error(
        before(ids).logits, t, from_logits=True, delta=0, ignore_index=0, reduction="mean"
    )
    assert_states("transformers", f"({loss:.2f} for {expected:.2f})")
    weight = torch.tensor([1.0, 2.0, 5.0])
    loss, _ = train("sum", {"weight": weight}, divide=True)
    weighted = F.cross_entropy(before(ids).logits, t, weight=weight)
    assert_states("transformers", f"give {loss / weighted:.2f} times")
    loss, _ = train("sum", divide=True, label_smoothing_factor=0.5)
    close(loss, whole)


@pytest.fixture
def language(arguments: Callable[..., Any]) -> SimpleNamespace:
    """A GPT-2 of a few thousand parameters, and rows of tokens, some of them padded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(50, (24, 8))
    labels = ids.clone()
    labels[::3, 5:] = -100
    data = [{"input_ids": r, "labels": t.clone()} for r, t in zip(ids, labels, strict=True)]
    before = copy.deepcopy(model)

    def whole(model: Any) -> Tensor:
        """The mean over all tokens except the first of each row."""
        return mean(lambda x: model(x).logits[:, :-1].flatten(0, 1), ids, labels[:, 1:].flatten())

    return SimpleNamespace(
        model=model,
        before=before,
        data=data,
        labels=labels,
        whole=whole,
        arguments=arguments(),
        make=arguments,
    )


def check_linear_trainer(names: Any, wanted: list[Tensor], monkeypatch: Any) -> None:
    """With `DistributedDataParallel`, two processes and bfloat16."""
    logits, _ = names.trainer.predict(names.data).predictions
    assert logits.shape == (24, 1, 50)
    inputs = {key: torch.stack([row[key] for row in names.data]) for key in ("input_ids", "labels")}
    count = (inputs["labels"] != -100).sum()
    if dist.is_available() and dist.is_gloo_available():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(names.before))
        monkeypatch.setattr(type(names.trainer.accelerator), "num_processes", 2)
        loss = names.trainer.compute_loss(wrapped, dict(inputs), num_items_in_batch=count)
        monkeypatch.undo()
        (loss / 2).backward()
        close([p.grad for p in wrapped.parameters()], wanted, rtol=1e-4, atol=1e-5)

    dtypes = set()
    model = copy.deepcopy(names.before)
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))

    def spy(hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        dtypes.add(torch.is_autocast_enabled("cpu"))
        return linear_cross_entropy_error(hidden, weight, *args, **options)

    monkeypatch.setitem(
        names.LinearTrainer.compute_loss.__globals__, "linear_cross_entropy_error", spy
    )
    names.LinearTrainer(model, names.make(bf16=True), train_dataset=names.data).train()
    assert dtypes == {torch.bfloat16, True}


@pytest.mark.parametrize("title", ["A causal language model", "The linear loss"])
def test_transformers_language_models(
    title: str, language: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer = pytest.importorskip("transformers").Trainer  # noqa: N806
    if title == "The linear loss":
        for row in language.data:
            row["labels"][0] = -100
    names = run(title, Trainer=Trainer, cross_entropy_error=cross_entropy_error, **vars(language))
    whole = language.whole(language.before)
    wanted = gradients(language.before, whole)
    close(logged(names.trainer), whole)
    close(gradients_of_step(language.before, language.model, 1), wanted, rtol=1e-4, atol=1e-5)
    if title == "The linear loss":
        check_linear_trainer(names, wanted, monkeypatch)
    else:
        averaged, after = (
            names.trainer.evaluate(names.data)["eval_loss"],
            language.whole(language.model),
        )
        assert_states(title, f"({averaged:.3f} for {after:.3f})")
        model = copy.deepcopy(language.before)
        for row, labels in zip(language.data, language.labels, strict=True):
            row["labels"] = labels
        trainer = Trainer(
            model,
            language.arguments,
            train_dataset=language.data,
            compute_loss_func=names.next_token_loss,
        )
        trainer.train()
        count = (language.labels != -100).sum()
        assert_states(title, f"{count} labels for {count - len(language.data)} predicted tokens")
        assert_states(title, f"a loss of {logged(trainer):.3f} for {whole:.3f}")


def test_transformers_packed_sequences(language: Any) -> None:
    names = run("Packed sequences", cross_entropy_error=cross_entropy_error, **vars(language))
    whole = language.whole(language.before)
    close(names.loss, whole)
    leaked = mean(lambda x: names.model(**x).logits[0, :-1], names.batch, names.labels[0, 1:])
    assert_states("Packed sequences", f"{leaked:.3f} for {whole:.3f}")


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    reset_accelerate()
    start = run()
    before = copy.deepcopy(start.network)
    with monkeypatch.context() as twice:  # Two processes with the same data.
        twice.setattr(accelerate.Accelerator, "reduce", lambda _, count: 2 * count)
        names = run(
            "accelerate",
            replace={"* accelerator.num_processes": "* 2"},
            **{**vars(start), **with_ignored_labels(start)},
        )
    wanted = gradients(before, mean(before, names.x, names.t))
    close(gradients_of_step(before, names.network), wanted)

    def accumulate(criterion: nn.Module) -> float:
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=3)
        network = copy.deepcopy(before)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        prepared, optimizer, loader = accelerator.prepare(network, optimizer, start.loader)
        for inputs, labels in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(criterion(prepared(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
        whole = gradients(before, mean(before, start.x, start.t))
        return ratio(gradients_of_step(before, network), whole)

    assert_states("accelerate", f"{accumulate(start.summed):.1f} times")
    assert accumulate(start.criterion) != pytest.approx(1, abs=1e-3)


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    start = run()
    before = copy.deepcopy(start.network)
    twice = SimpleNamespace(all_reduce=lambda count: count.mul_(2), get_world_size=lambda: 2)
    names = run(  # Two processes with the same data.
        "DeepSpeed",
        replace={"import torch.distributed as dist": ""},
        **{**vars(start), **with_ignored_labels(start), "dist": twice},
    )
    wanted = gradients(before, mean(before, names.x, names.t))
    close(gradients_of_step(before, names.network), wanted)
    wanted = gradients(before, mean(before, start.x, start.t))
    k = '"gradient_accumulation_steps": 3'
    for config in (k, f'{k}, "gradient_clipping": 0.0'):
        names = run("DeepSpeed", replace={" * factor": "", k: config})
        assert_states(
            "DeepSpeed", f"{ratio(gradients_of_step(before, names.network), wanted):.1f} times"
        )


def test_skorch() -> None:
    pytest.importorskip("skorch")
    pytest.importorskip("sklearn")
    names = run("skorch")
    w, x, t, network = names.w, names.x.numpy(), names.t.numpy(), names.network

    def last_loss(classifier: Any, data: Any, **parameters: Any) -> float:
        """The loss of an epoch with a learning rate of 0."""
        options = {"lr": 0.0, "max_epochs": 1, "train_split": None, "verbose": 0}
        classifier.set_params(**(options | {"batch_size": 32} | parameters)).fit(data, t)
        return float(classifier.history[-1, "train_loss"])

    found = last_loss(names.classifier, x)
    probabilities = names.classifier.module_(names.x)
    whole = CrossEntropyError(reduction="mean")(probabilities, names.t)
    close(found, whole)
    by_default = last_loss(names.classifier, x, criterion__reduction="sum")
    assert_states(
        "skorch", f"{by_default / found:.1f} times", f"({by_default:.2f} for {found:.3f})"
    )
    weight = torch.tensor([1.0, 2.0, 5.0])
    options = {"criterion__reduction": "mean", "criterion__weight": weight}
    whole = CrossEntropyError(reduction="mean", weight=weight)(probabilities, names.t)
    close(last_loss(names.classifier, x, batch_size=74, **options), whole)

    close(last_loss(names.from_logits, x), mean(network, names.x, names.t))
    best = names.search.best_estimator_
    assert best.criterion_.delta == names.search.best_params_["criterion__delta"]
    close(torch.as_tensor(best.predict_proba(x)), best.module_(names.x).softmax(1))

    names.from_logits.set_params(predict_nonlinearity="auto")
    close(names.from_logits.predict_proba(x), names.from_logits.module_(names.x))
    with pytest.raises(TypeError, match="sample_weight"):
        names.from_logits.fit(x, t, sample_weight=w.numpy())

    data = {"x": x, "sample_weight": w.numpy()}
    whole = names.weighted.criterion_(network(names.x), names.t, sample_weight=w)
    close(last_loss(names.weighted, data, batch_size=74), whole)
    assert_states("skorch", f"({last_loss(names.weighted, data):.3f} for {whole:.3f})")


def test_ignite() -> None:
    engine = pytest.importorskip("ignite.engine")
    metrics = pytest.importorskip("ignite.metrics")
    names = run("ignite")
    whole = mean(names.network, names.x, names.t)
    close(names.mean, whole)
    evaluator = engine.create_supervised_evaluator(
        names.network, {"loss": metrics.Loss(names.summed)}
    )
    by_default = evaluator.run(names.loader).metrics["loss"]
    assert_states("ignite", f"{by_default / whole:.0f} times")
    before = copy.deepcopy(names.network)
    trainer = engine.create_supervised_trainer(
        names.network, names.optimizer, names.summed, gradient_accumulation_steps=3
    )
    trainer.run(names.loader)
    wanted = gradients(before, mean(before, names.x, names.t))
    assert_states("ignite", f"{ratio(gradients_of_step(before, names.network), wanted):.1f} times")
    names = run("ignite", **with_ignored_labels(names))
    close(names.mean, mean(names.network, names.x, names.t))


def test_fastai() -> None:
    pytest.importorskip("fastai.torch_core").default_device(use=False)
    mixup = pytest.importorskip("fastai.callback.mixup")
    names = run("fastai")
    whole = mean(names.network, names.x, names.t)
    close(names.mean, whole)
    close(names.probabilities, names.network(names.x).softmax(1))
    assert names.classes.equal(names.network(names.x).argmax(1))
    names.learner.loss_func = names.summed
    (by_default,) = names.learner.validate()
    assert_states("fastai", f"{by_default / whole:.0f} times")
    assert_states("fastai", f"{names.learner.get_preds()[0][0].sum():.2f}".replace("-", "−"))
    with names.learner.no_logging(), pytest.raises(RuntimeError):
        names.learner.fit(1, cbs=mixup.MixUp())
    names.learner.loss_func = names.of_labels
    with names.learner.no_logging():
        names.learner.fit(1, cbs=mixup.MixUp())
    assert names.of_labels.reduction == "mean"

    names = run("fastai", replace={"bs=32": "bs=74"})
    before = copy.deepcopy(names.network)
    training = pytest.importorskip("fastai.callback.training")
    with names.learner.no_logging():
        names.learner.fit(1, lr=0.5, cbs=training.GradientAccumulation())
    wanted = gradients(before, mean(before, names.x, names.t))
    assert_states("fastai", f"{ratio(gradients_of_step(before, names.network), wanted):.1f} times")


def test_keras() -> None:
    keras = pytest.importorskip("keras")
    start = run().network
    initial = [start.weight.detach().numpy().T, start.bias.detach().numpy()]
    names = run(
        "Keras", replace={"mean = ": "model.set_weights(initial); mean = "}, initial=initial
    )

    def network(x: Tensor) -> Tensor:
        return torch.as_tensor(names.model(x)).detach()

    whole = mean(network, names.x, names.t)
    close(names.mean, whole)

    def evaluate(reduction: Any, **options: Any) -> float:
        criterion = CrossEntropyError(from_logits=True, delta=0, dim=-1, reduction=reduction)
        names.model.compile("sgd", loss=lambda target, output: criterion(output, target.long()))
        return float(names.model.evaluate(names.x, names.t, verbose=0, **options))

    assert_states("Keras", f"{evaluate('sum') / whole:.0f} times")
    w = torch.rand(74)
    names.model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    theirs = names.model.evaluate(names.x, names.t, verbose=0, sample_weight=w)
    close(evaluate("none", sample_weight=w), torch.tensor(theirs))
    assert_states("Keras", f"({evaluate('mean', sample_weight=w):.3f} for {theirs:.3f})")
    names.model.compile("sgd", loss=names.elementwise)
    with pytest.raises(ValueError, match="target") as caught:
        names.model.evaluate(names.x, names.t, verbose=0)
    assert_states("What an error looks like", f"ValueError: {caught.value}")
    swapped = names.model.evaluate(names.x, F.one_hot(names.t, 3), verbose=0)
    assert_states("Keras", f"({swapped:.2f} for {whole:.2f})".replace("-", "−"))


def clipped_mean(losses: Callable[[Tensor, Tensor], Tensor], names: Any) -> list[Tensor]:
    """The mean of the samples' gradients, each clipped to a norm of 10."""
    total = [torch.zeros_like(parameter) for parameter in names.network.parameters()]
    for x, t in zip(names.x.split(1), names.t.split(1), strict=True):
        row = gradients(names.network, losses(names.network(x), t).sum())
        excess = max(1.0, ratio(row, [torch.ones(1)]) / 10)
        total = [sum + g / excess for sum, g in zip(total, row, strict=True)]
    return [sum / len(names.t) for sum in total]


@pytest.mark.parametrize("title", ["Opacus", "The ghost mode"])
def test_opacus(title: str) -> None:
    opacus = pytest.importorskip("opacus")
    start = run()
    names = run(
        title,
        replace={"noise_multiplier=1.0": "noise_multiplier=0.0, poisson_sampling=False"},
        loader=DataLoader(start.loader.dataset, batch_size=74),
        PrivacyEngine=opacus.PrivacyEngine,
    )
    if title == "The ghost mode":
        criterion = names.private_criterion

        def losses(y: Tensor, t: Tensor) -> Tensor:
            return sum_squared_error(y, t, reduction="none").sum(1)
    else:
        criterion = names.criterion
        losses = CrossEntropyError(from_logits=True, delta=0, reduction="none")
    wanted = clipped_mean(losses, start)
    criterion(names.private(start.x), start.t).backward()
    names.private_optimizer.step()
    close(gradients_of_step(start.network, names.network), wanted)
    if title == "The ghost mode":
        with pytest.raises(AssertionError):
            run(
                title,
                replace={'ghost"': 'ghost", loss_reduction="sum"'},
                PrivacyEngine=opacus.PrivacyEngine,
            )
        return

    def norms(criterion: nn.Module, t: Tensor) -> Any:
        names.private_optimizer.zero_grad()
        criterion(names.private(start.x), t).backward()
        rows = [p.grad_sample.flatten(1) for p in names.network.parameters()]
        return torch.cat(rows, 1).norm(dim=1)

    right, wrong = norms(names.criterion, start.t), norms(names.summed, start.t)
    assert_states(title, f"{wrong.mean() / right.mean():.0f} times too large")
    assert_states(title, f"all {(wrong > 10).sum()} are clipped, where the mean clips none")
    assert not (right > 10).any()
    halved = norms(names.criterion, start.t.where(torch.arange(74) % 2 == 0, -100))
    assert_states(title, f"are {(halved[::2] / right[::2]).mean():.1f} times too large")


def test_opacus_on_tokens() -> None:
    opacus = pytest.importorskip("opacus")
    x, t = torch.randn(6, 5, 20), torch.randint(3, (6, 5))
    start = run()
    names = run(
        "The ghost mode",
        replace={
            "noise_multiplier=1.0": "noise_multiplier=0.0, poisson_sampling=False",
            'OfRows(reduction="mean")': "criterion",
        },
        loader=DataLoader(TensorDataset(x, t), batch_size=6),
        PrivacyEngine=opacus.PrivacyEngine,
    )
    z = names.private(x)
    (call,) = re.findall(
        r"`(private_criterion\(.*?\))`", " ".join(SECTIONS["The ghost mode"].split())
    )
    eval(call, vars(names) | {"z": z, "t": t}).backward()  # noqa: S307
    names.private_optimizer.step()
    whole = mean(start.network, x.flatten(0, 1), t.flatten())
    close(gradients_of_step(start.network, names.network), gradients(start.network, whole))


def test_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    names = run("BackPACK")
    before = run().network
    wanted = gradients(before, mean(before, names.x, names.t))[0] * 74
    close(names.per_sample.sum(0), wanted)

    def whole(weight: Tensor) -> Tensor:
        logits = F.linear(names.x, weight, before.bias.detach())
        return cross_entropy_error(logits, names.t, from_logits=True, delta=0)

    hessian = torch.autograd.functional.hessian(whole, before.weight.detach())
    close(names.diagonal.flatten(), torch.as_tensor(hessian).reshape(60, 60).diagonal())
    with (
        pytest.raises(NotImplementedError),
        backpack.backpack(extensions.DiagGGNExact()),
    ):
        backpack.extend(names.summed)(names.network(names.x), names.t).backward()


def test_laplace() -> None:
    laplace = pytest.importorskip("laplace")
    names = run("Laplace")
    close(names.posterior.loss, names.summed(names.network(names.x), names.t))
    factor = names.posterior.loss / mean(names.network, names.x, names.t)
    assert_states("Laplace", f"{factor:.0f} times")
    regression = laplace.Laplace(names.network, "regression", subset_of_weights="all")
    targets = torch.randn(74, 3)
    regression.fit(DataLoader(TensorDataset(names.x, targets), batch_size=32))
    close(regression.loss, SumSquaredError()(names.network(names.x), targets))


def test_captum() -> None:
    pytest.importorskip("captum")
    names = run("captum")
    network = names.network
    # Attributions add up to the difference from the loss at the baseline of 0.
    differences = names.per_sample(network(names.x), names.t) - names.per_sample(
        network(torch.zeros_like(names.x)), names.t
    )
    close(names.attribution.sum(1), differences, atol=1e-3)
    losses = [mean(network, x, t) for x, t in zip(names.x.split(1), names.t.split(1), strict=True)]
    rows = torch.stack(
        [torch.cat([g.flatten() for g in gradients(network, loss)]) for loss in losses]
    )
    close(names.influence, rows @ rows.T, rtol=1e-4, atol=1e-4)
    plain = run("captum", replace={"loss_fn=criterion": "loss_fn=lambda y, t: criterion(y, t)"})
    assert_states("captum", f"{ratio([names.influence], [plain.influence]):.0f} times too small")
    with pytest.raises(IndexError):
        run("captum", replace={'reduction="none"': 'reduction="mean"'})


def test_monai() -> None:
    losses = pytest.importorskip("monai.losses")
    names = run("MONAI")
    y, t = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8)).float()
    theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True)(y, t)
    assert names.dice_cross_entropy(y, t) == theirs
    with pytest.raises(ValueError, match="target") as caught:
        names.criterion(y, t)
    assert_states("MONAI", f"ValueError: {caught.value}")
    whole = mean(lambda y: y, y, t.squeeze(1).long())
    total = names.summed(y, t.squeeze(1).long())
    dice = names.dice(y, t)
    assert_states("MONAI", f"{total / whole:.0f} times", f"{100 * dice / (total + dice):.1f} %")


def test_segmentation_models() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    names = run("segmentation-models-pytorch")
    logits, masks = names.unet(names.images).detach(), names.masks.long()
    close(names.loss, F.cross_entropy(logits, masks, ignore_index=255))
    close(names.of_pixels(logits, names.masks), F.cross_entropy(logits, masks, ignore_index=255))
    assert_states("segmentation-models-pytorch", f"{(masks != 255).sum()} times")
    close(
        names.binary, F.binary_cross_entropy_with_logits(names.foreground[:, 0], names.mask.float())
    )


def test_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    start = run()
    names = run("torchmetrics", **with_ignored_labels(start))
    whole = mean(names.network, names.x, names.t)
    close(names.mean, whole)
    of_means, unweighted = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
    for inputs, labels in names.loader:
        of_means.update(names.criterion(names.network(inputs), labels))
        unweighted.update(names.unreduced(names.network(inputs), labels))
    assert_states("torchmetrics", f"({of_means.compute():.3f} for {whole:.3f})")
    assert_states("torchmetrics", f"({unweighted.compute():.3f})")


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    start = run()
    names = run("Lightning's log", **with_ignored_labels(start))

    def logged_mean(criterion: nn.Module, loader: Any, *, with_batch_size: bool = True) -> float:
        model = names.Classifier()
        model.criterion = criterion
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
        if not with_batch_size:
            log = model.log
            model.log = lambda *args, batch_size, **options: log(*args, **options)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **options
        )
        trainer.fit(model, loader)
        return float(trainer.callback_metrics["loss"])

    whole = mean(names.network, names.x, names.t)
    close(logged_mean(names.criterion, names.loader), whole)
    unsized = logged_mean(names.criterion, names.loader, with_batch_size=False)
    assert_states("Lightning's log", f"({unsized:.3f} for {whole:.3f})")
    factor = logged_mean(names.summed, start.loader) / mean(names.network, start.x, start.t)
    assert_states("Lightning's log", f"{factor:.0f} times")


def test_ensembles() -> None:
    names = run("Ensembles")
    for number, network in enumerate(names.networks):
        whole = mean(network, names.x, names.t)
        close(names.losses[number], whole)
        for name, parameter in network.named_parameters():
            (gradient,) = torch.autograd.grad(whole, parameter, retain_graph=True)
            close(names.gradients[name][number], gradient)

    def joint(stacked: dict[str, Tensor]) -> Tensor:
        def logits(parameters: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(names.skeleton, parameters, names.x)

        outputs = torch.func.vmap(logits)(stacked)
        return mean(lambda y: y, outputs.flatten(0, 1), names.t.repeat(4))

    gradient = torch.func.grad(joint)(names.stacked)
    factor = ratio(list(gradient.values()), list(names.gradients.values()))
    assert_states("Ensembles", f"gives each {factor:.2f} times")


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@needs_gloo
def test_pipelining() -> None:
    names = run("Pipelining", **with_ignored_labels(run()))
    network = run().network
    wanted = gradients(network, mean(network, names.x, names.t))
    close([parameter.grad for parameter in names.network.parameters()], wanted)
    means = {"summed(y, t) / count": "criterion(y, t)", ", scale_grads=False": ""}
    names = run("Pipelining", replace=means, **with_ignored_labels(run()))
    factor = ratio([p.grad for p in names.network.parameters()], wanted)
    assert_states("Pipelining", f"a gradient {factor:.2f} times")
    names = run("Pipelining", replace={", scale_grads=False": ""})
    whole = gradients(network, mean(network, names.x, names.t))
    factor = ratio([p.grad for p in names.network.parameters()], whole)
    assert factor == pytest.approx(1 / 2)


@needs_gloo
def test_precision_policies() -> None:
    names = run("Precision policies of FSDP2", dist=dist)
    rounded = [p.to_local().bfloat16() for p in names.model.parameters()]
    output = F.linear(names.x.bfloat16(), *rounded).float()
    assert names.output.dtype == torch.float32
    close(names.output, output)
    close(names.loss, SumSquaredError(reduction="mean")(output, names.x[:, :1]))

    class Inside(nn.Module):
        def __init__(self, criterion: nn.Module) -> None:
            super().__init__()
            self.criterion = criterion

        def forward(self, x: Tensor, t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return self.criterion(x, t), target

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    weight = torch.tensor([0.3, 2.0, 5.0])
    y, target = torch.randn(74, 3), torch.full((74, 1), 1000.3)
    ours = CrossEntropyError(from_logits=True, delta=0, reduction="mean", weight=weight)
    inside = names.fully_shard(Inside(ours), mp_policy=names.policy)
    loss, target = inside(y, names.t, target)
    assert f"{target[0].item():g}" == "1000"
    close(loss, F.cross_entropy(y.bfloat16().float(), names.t, weight=weight))
    inside = names.fully_shard(Inside(nn.CrossEntropyLoss(weight)), mp_policy=names.policy)
    with pytest.raises(RuntimeError):
        inside(y, names.t, target)


@needs_gloo
def test_loss_parallel() -> None:
    names = run("`loss_parallel`", dist=dist)
    y = names.network(names.x).detach().requires_grad_()
    close(names.gradient, torch.autograd.grad(mean(lambda y: y, y, names.soft), y)[0])
    theirs = run("`loss_parallel`", dist=dist, criterion=F.cross_entropy)
    close(theirs.gradient, -theirs.soft / 74)
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
    with pytest.raises(RuntimeError):
        run(
            "`loss_parallel`",
            dist=dist,
            criterion=smooth,
            replace={"(logits, soft)": "(logits, t)"},
        )


def test_names_of_a_checkpoint() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    title = "`compile` and the names of a checkpoint"
    names = run(title, replace={".compile()": ".compile(backend=backend)"}, backend=backend)
    assert names.names == ["network.weight", "network.bias", "criterion.weight"]
    assert len(graphs) == 1
    weight = torch.tensor([1.0, 2.0, 5.0])
    probabilities = names.network(names.x).softmax(1)
    close(names.loss, CrossEntropyError(weight=weight, reduction="mean")(probabilities, names.t))
    saved = names.model.state_dict()
    names.model["criterion"] = torch.compile(CrossEntropyError(weight=torch.ones(3)))
    missing, unexpected = names.model.load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["criterion._orig_mod.weight"], ["criterion.weight"])
    assert names.model["criterion"].weight.tolist() == [1, 1, 1]


def test_constants_of_aot_inductor() -> None:
    names = run("AOTInductor's constants")
    close(names.loss, mean(names.network, names.x, names.t, "sum"))
    with pytest.raises(RuntimeError) as caught:
        run("AOTInductor's constants", replace={'_constants": True': '_constants": False'})
    assert_states("AOTInductor's constants", f"RuntimeError: {caught.value}")


def test_mixup() -> None:
    pytest.importorskip("torchvision")
    names = run("MixUp and CutMix of torchvision")
    images, other = names.images, names.images.roll(1, 0)
    share = ((names.mixed - other) / (images - other)).median()
    label = names.labels.long()

    def losses(label: Tensor) -> Tensor:
        return mean(lambda mixed: mixed.mean((2, 3)), names.mixed, label, reduction="none")

    close(names.loss, (share * losses(label) + (1 - share) * losses(label.roll(1))).mean())
    for labels in (names.labels, names.labels.long().where(names.labels != 1, -100)):
        with pytest.raises(RuntimeError):
            names.v2.MixUp(num_classes=3)(names.images, labels)


def test_masks() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    names = run("Masks of torchvision", v2=v2)
    assert names.mask.unique().tolist() == [1, 255]
    filled = run(
        "Masks of torchvision", v2=v2, replace={"tv_tensors.Mask: 255": "tv_tensors.Mask: 0"}
    )
    z = torch.randn(1, 3, 8, 8)

    def loss(mask: Tensor) -> Tensor:
        return cross_entropy_error(
            z, mask[None], from_logits=True, delta=0, ignore_index=255, reduction="mean"
        )

    ones = names.mask == 1
    close(loss(names.mask), -z.log_softmax(1)[0, 1][ones].mean())
    title = "Masks of torchvision"
    assert_states(title, f"{(filled.mask == 0).sum()} of these 64 pixels")
    assert_states(title, f"(a loss of {loss(filled.mask):.3f} for {loss(names.mask):.3f})")


def test_hydra() -> None:
    pytest.importorskip("hydra")
    names = run("Hydra")
    probabilities = names.network(names.x).softmax(1)
    weight = torch.tensor([1.0, 2.0, 5.0])
    whole = CrossEntropyError(weight=weight, reduction="mean")(probabilities, names.t)
    assert names.from_file(probabilities, names.t) == whole
    with pytest.raises(Exception, match="ListConfig") as caught:
        run("Hydra", replace={"{_target_: torch.tensor, data: [1.0, 2.0, 5.0]}": "[1.0, 2.0, 5.0]"})
    assert "weight: got ListConfig" in str(caught.value)
    assert_states("Hydra", "weight: got ListConfig")


def test_averaged_models() -> None:
    network = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    start = run()
    wanted = copy.deepcopy(network)
    by_hand = copy.deepcopy(network)
    names = run("Averaged models", network=network, optimizer=optimizer)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        mean(by_hand, start.x, start.t).backward()
        optimizer.step()
        for old, new in zip(
            wanted.state_dict().values(), by_hand.state_dict().values(), strict=True
        ):
            old.copy_(0.9 * old + 0.1 * new if step else new)
    close(names.loss, mean(wanted, start.x, start.t))  # Both update their batch norm once more.
    theirs = dict(names.averaged.module.state_dict())
    for name, value in wanted.state_dict().items():
        if value.is_floating_point():
            close(theirs[name], value)

    constant = CrossEntropyError(weight=torch.tensor([9, 1, 2]))
    averaged = names.AveragedModel(
        constant, multi_avg_fn=names.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(3):
        averaged.update_parameters(constant)
    assert averaged.module.weight.tolist() == [8, 1, 2]


def test_documented_error_messages() -> None:
    title = "What an error looks like"
    with pytest.raises(TypeError) as caught:
        SumSquaredError()(torch.zeros(74, 1), torch.zeros(74))
    assert_states(title, f"TypeError: {caught.value}")


MODULES = {
    "torch": "torch",
    "Keras": "keras",
    "optax": "optax",
    "scikit-learn": "sklearn",
    "skorch": "skorch",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "MONAI": "monai.losses",
}


def test_every_section_with_identities_is_tested() -> None:
    assert {title for title, text in MIGRATION.items() if ">>>" in text} == {HALF, *MODULES}


@pytest.mark.parametrize("title", MODULES)
def test_migration(title: str) -> None:
    pytest.importorskip(MODULES[title])
    text = MIGRATION[HALF] + MIGRATION[title]
    test = doctest.DocTestParser().get_doctest(text, {}, title, "migration.md", 0)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert "".join(report) == ""


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
def test_figures_of_the_linear_loss() -> None:
    chunked = functools.partial(
        F.linear_cross_entropy,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    ours = functools.partial(linear_cross_entropy_error, delta=0, reduction="mean")
    x = torch.zeros(2048, 4, dtype=torch.bfloat16)
    weight, t = torch.zeros(8000, 4, dtype=torch.bfloat16), torch.zeros(2048).long()
    figures = f"{chunked(x, weight, t):.1f} where {ours(x, weight, t):.2f} is right"
    for text in (README["Where it differs from torch"], MIGRATION["torch"]):
        assert f" {figures}" in " ".join(text.split())
    x, weight, t = x[:8].requires_grad_(), weight[:8].requires_grad_(), t[:8] - 100
    for criterion, expected in ((chunked, math.nan), (ours, 0.0)):
        loss = criterion(x, weight, t)
        for each in (loss, *torch.autograd.grad(loss, (x, weight))):
            close(each, torch.full_like(each, expected), equal_nan=True)
