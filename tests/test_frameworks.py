"""Every recipe of `examples/frameworks.md` gives the loss of all samples at once.

The tests run the code of the document, and hold its figures to what they see. The identities of
`examples/migration.md` are doctests. A framework that is not installed is skipped by name; the
extra `frameworks` has them all.
"""

import copy
import doctest
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
from torchlosses.functional import cross_entropy_error, sum_squared_error

pytestmark = pytest.mark.filterwarnings("ignore")  # Frameworks warn of each other.

EXAMPLES = Path(__file__).parents[1] / "examples"


def sections(name: str) -> dict[str, str]:
    """The text under each heading."""
    text = (EXAMPLES / name).read_text("utf-8")
    _, *parts = re.split(r"^##+ (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


SECTIONS = sections("frameworks.md")
MIGRATION = sections("migration.md")
START = "The names below"  # In the one document,
HALF = "Who has the factor ½"  # and in the other.


def run(*titles: str, replace: tuple[str, str] = ("", ""), **names: Any) -> SimpleNamespace:
    """The names after the code of these sections, which finds those of the first and `names`."""
    scope: dict[str, Any] = {"__name__": "recipe"}
    torch.manual_seed(0)
    for title in (START, *titles):
        for block in re.findall(
            r"^```python\n(.*?)^```", SECTIONS[title], re.DOTALL | re.MULTILINE
        ):
            exec(compile(block.replace(*replace), f"frameworks.md: {title}", "exec"), scope)  # noqa: S102
        if title == START:
            scope |= names
    return SimpleNamespace(**scope)


def says(title: str, *figures: str) -> None:
    """Complains of a figure that the section does not have."""
    text = " ".join(SECTIONS[title].split())
    assert [figure for figure in figures if figure not in text] == []


def mean(
    network: Callable[..., Tensor], x: Tensor, t: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """The loss of all samples at once."""
    return cross_entropy_error(network(x), t, from_logits=True, delta=0, reduction=reduction)


def ignoring(names: SimpleNamespace) -> dict[str, Any]:
    """The labels of the document with more ignored in one batch than in another."""
    t = names.t.clone()
    t[:20] = -100
    return {"t": t, "loader": DataLoader(TensorDataset(names.x, t), batch_size=32)}


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def step_of(before: nn.Module, after: nn.Module, lr: float = 0.5) -> list[Tensor]:
    """The gradients that plain SGD went by."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [(old - new).detach() / lr for old, new in pairs]


def ratio(found: list[Tensor], wanted: list[Tensor]) -> float:
    """How many times as long `found` is as `wanted`."""
    lengths = [torch.cat([g.flatten() for g in each]).norm() for each in (found, wanted)]
    return float(lengths[0] / lengths[1])


def close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Numbers, of Python or NumPy too, are those of tensors."""
    if isinstance(wanted, Tensor):
        found, wanted = torch.as_tensor(found), wanted.detach()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, check_dtype=False)


@pytest.fixture(autouse=True)
def _left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, with files in a folder of their own, and no group of processes that stays."""
    for name, value in {
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "KERAS_BACKEND": "torch",
        "KERAS_TORCH_DEVICE": "cpu",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def forget_accelerators() -> None:
    """What one has set, all that come later in a process have."""
    state = pytest.importorskip("accelerate.state")
    for shared in (state.AcceleratorState, state.GradientState, state.PartialState):
        shared._reset_state()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """Of a `Trainer` that takes one step of 4 parts of 6 samples."""
    transformers = pytest.importorskip("transformers")
    forget_accelerators()

    def make(**options: Any) -> Any:
        kept = {
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
        return transformers.TrainingArguments(str(tmp_path / "trainer"), **(kept | options))

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
    close(step_of(before, model, lr=1), wanted)

    def train(reduction: Any, **options: Any) -> tuple[float, list[Tensor]]:
        model = copy.deepcopy(before)
        criterion = CrossEntropyError(from_logits=True, delta=0, reduction=reduction)
        trainer = transformers.Trainer(
            model,
            arguments(**options),
            train_dataset=data,
            compute_loss_func=lambda y, t, num_items_in_batch: criterion(y.logits, t),
        )
        trainer.train()
        return logged(trainer), step_of(before, model, lr=1)

    loss, step = train("mean")
    says("transformers", f"{loss:.3f} for {whole:.3f}", f"gives {ratio(step, wanted):.0f} times")
    loss, step = train("sum")
    assert loss / whole.item() == pytest.approx(ratio(step, wanted))
    says("transformers", f"an undivided sum {ratio(step, wanted):.0f} times")
    _, step = train("sum", max_grad_norm=1.0)
    assert ratio(step, [torch.ones(1)]) == pytest.approx(1, rel=1e-4)


@pytest.fixture
def language(arguments: Callable[..., Any]) -> SimpleNamespace:
    """A GPT-2 of some thousand parameters, and rows of tokens of which some are padding."""
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
        """The mean over all tokens but the first of each row."""
        return mean(lambda x: model(x).logits[:, :-1].flatten(0, 1), ids, labels[:, 1:].flatten())

    return SimpleNamespace(
        model=model, before=before, data=data, labels=labels, whole=whole, arguments=arguments()
    )


@pytest.mark.parametrize("title", ["A causal language model", "The linear loss"])
def test_transformers_of_tokens(title: str, language: Any) -> None:
    Trainer = pytest.importorskip("transformers").Trainer  # noqa: N806
    if title == "The linear loss":
        for row in language.data:
            row["labels"][0] = -100
    names = run(title, Trainer=Trainer, cross_entropy_error=cross_entropy_error, **vars(language))
    whole = language.whole(language.before)
    wanted = gradients(language.before, whole)
    close(logged(names.trainer), whole)
    close(step_of(language.before, language.model, 1), wanted, rtol=1e-4, atol=1e-5)
    if title == "A causal language model":
        averaged, after = names.trainer.evaluate()["eval_loss"], language.whole(language.model)
        says(title, f"({averaged:.3f} for {after:.3f})")
        model = copy.deepcopy(language.before)
        for row, labels in zip(language.data, language.labels, strict=True):
            row["labels"] = labels
        trainer = Trainer(
            model,
            language.arguments,
            train_dataset=language.data,
            compute_loss_func=names.compute_causal_loss,
        )
        trainer.train()
        count = (language.labels != -100).sum()
        says(title, f"{count} labels for {count - len(language.data)} predicted tokens")
        says(title, f"a loss of {logged(trainer):.3f} for {whole:.3f}")


def test_transformers_packed(language: Any) -> None:
    names = run("Packed sequences", cross_entropy_error=cross_entropy_error, **vars(language))
    whole = language.whole(language.before)
    close(names.loss, whole)
    batch = {name: names.batch[name] for name in ("input_ids", "position_ids")}
    leaked = mean(lambda _: names.model(**batch).logits[0], batch["input_ids"], names.labels[0])
    says("Packed sequences", f"{leaked:.3f} for {whole:.3f}")


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    forget_accelerators()
    start = run()
    before = copy.deepcopy(start.network)
    names = run("accelerate", **{**vars(start), **ignoring(start)})
    wanted = gradients(before, mean(before, names.x, names.t))
    close(step_of(before, names.network), wanted)

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
        return ratio(step_of(before, network), whole)

    says("accelerate", f"{accumulate(start.summed):.1f} times")
    assert accumulate(start.criterion) != pytest.approx(1, abs=1e-3)


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 3,
        "zero_allow_untrusted_optimizer": True,
    }
    start = run()
    before = copy.deepcopy(start.network)
    names = run("DeepSpeed", config=config, **{**vars(start), **ignoring(start)})
    wanted = gradients(before, mean(before, names.x, names.t))
    close(step_of(before, names.network), wanted)
    wanted = gradients(before, mean(before, start.x, start.t))
    for options in ({"gradient_clipping": 0.0}, {}):
        names = run("DeepSpeed", config=config | options, replace=(" * k / count", ""))
        says("DeepSpeed", f"{ratio(step_of(before, names.network), wanted):.1f} times")


def test_skorch() -> None:
    pytest.importorskip("skorch")
    pytest.importorskip("sklearn")
    w = torch.rand(74)
    names = run("skorch", w=w)
    x, t, network = names.x.numpy(), names.t.numpy(), names.network

    def last_loss(classifier: Any, data: Any, **parameters: Any) -> float:
        """Of an epoch that learns nothing."""
        options = {"lr": 0.0, "max_epochs": 1, "train_split": None, "verbose": 0}
        classifier.set_params(**(options | {"batch_size": 32} | parameters)).fit(data, t)
        return float(classifier.history[-1, "train_loss"])

    found = last_loss(names.classifier, x)
    probabilities = names.classifier.module_(names.x)
    whole = CrossEntropyError(reduction="mean")(probabilities, names.t)
    close(found, whole)
    by_default = last_loss(names.classifier, x, criterion__reduction="sum")
    says("skorch", f"{by_default / found:.1f} times", f"({by_default:.2f} for {found:.3f})")
    weight = torch.tensor([1.0, 2.0, 5.0])
    options = {"criterion__reduction": "mean", "criterion__weight": weight}
    whole = CrossEntropyError(reduction="mean", weight=weight)(probabilities, names.t)
    close(last_loss(names.classifier, x, batch_size=74, **options), whole)

    close(last_loss(names.from_logits, x), mean(network, names.x, names.t))
    best = names.search.best_estimator_
    assert best.criterion_.delta == names.search.best_params_["criterion__delta"]
    close(torch.as_tensor(best.predict_proba(x)), best.module_(names.x).softmax(1))

    data = {"x": x, "sample_weight": w.numpy()}
    whole = names.weighted.criterion_(network(names.x), names.t, sample_weight=w)
    close(last_loss(names.weighted, data, batch_size=74), whole)
    says("skorch", f"({last_loss(names.weighted, data):.3f} for {whole:.3f})")


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
    says("ignite", f"{by_default / whole:.0f} times")
    names = run("ignite", **ignoring(names))
    close(names.mean, mean(names.network, names.x, names.t))


def test_fastai() -> None:
    pytest.importorskip("fastai.torch_core").default_device(use=False)
    mixup = pytest.importorskip("fastai.callback.mixup")
    names = run("fastai")
    whole = mean(names.network, names.x, names.t)
    close(names.mean, whole)
    close(names.probabilities, names.network(names.x).softmax(1))
    names.learner.loss_func = names.summed
    (by_default,) = names.learner.validate()
    says("fastai", f"{by_default / whole:.0f} times")
    names.learner.loss_func = names.criterion
    with names.learner.no_logging():
        names.learner.fit(1, cbs=mixup.MixUp())
    assert names.criterion.reduction == "mean"


def test_keras() -> None:
    keras = pytest.importorskip("keras")
    names = run("Keras")

    def network(x: Tensor) -> Tensor:
        return torch.as_tensor(names.model(x)).detach()

    whole = mean(network, names.x, names.t)
    close(names.mean, whole)

    def evaluate(reduction: Any, **options: Any) -> float:
        criterion = CrossEntropyError(from_logits=True, delta=0, dim=-1, reduction=reduction)
        names.model.compile("sgd", loss=lambda target, output: criterion(output, target.long()))
        return float(names.model.evaluate(names.x, names.t, verbose=0, **options))

    says("Keras", f"{evaluate('sum') / whole:.0f} times")
    w = torch.rand(74)
    names.model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    theirs = names.model.evaluate(names.x, names.t, verbose=0, sample_weight=w)
    close(evaluate("none", sample_weight=w), torch.tensor(theirs))
    assert evaluate("mean", sample_weight=w) != pytest.approx(theirs, abs=1e-3)
    names.model.compile("sgd", loss=names.elementwise)
    with pytest.raises(ValueError, match=r"got shape \(32, 3\) for an input of shape \(32,\)"):
        names.model.evaluate(names.x, names.t, verbose=0)
    names.model.evaluate(names.x, F.one_hot(names.t, 3), verbose=0)


def clipped(losses: Callable[[Tensor, Tensor], Tensor], names: Any) -> list[Tensor]:
    """The mean of the samples' gradients, none of which is longer than 1."""
    total = [torch.zeros_like(parameter) for parameter in names.network.parameters()]
    for x, t in zip(names.x.split(1), names.t.split(1), strict=True):
        row = gradients(names.network, losses(names.network(x), t).sum())
        length = max(1.0, ratio(row, [torch.ones(1)]))
        total = [sum + g / length for sum, g in zip(total, row, strict=True)]
    return [sum / len(names.t) for sum in total]


@pytest.mark.parametrize("title", ["Opacus", "The ghost mode"])
def test_opacus(title: str) -> None:
    opacus = pytest.importorskip("opacus")
    start = run()
    names = run(
        title,
        replace=("noise_multiplier=1.0", "noise_multiplier=0.0, poisson_sampling=False"),
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
    wanted = clipped(losses, start)
    criterion(names.private(start.x), start.t).backward()
    names.private_optimizer.step()
    close(step_of(start.network, names.network), wanted)
    if title == "The ghost mode":
        with pytest.raises(AssertionError):
            run(
                title,
                replace=('ghost"', 'ghost", loss_reduction="sum"'),
                PrivacyEngine=opacus.PrivacyEngine,
            )
    else:
        sizes = []
        for criterion in (names.criterion, names.summed):
            names.private_optimizer.zero_grad()
            criterion(names.private(start.x), start.t).backward()
            sizes.append([names.network.weight.grad_sample])
        says(title, f"{ratio(*reversed(sizes)):.0f} times too large")


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
    regression = laplace.Laplace(names.network, "regression", subset_of_weights="all")
    targets = torch.randn(74, 3)
    regression.fit(DataLoader(TensorDataset(names.x, targets), batch_size=32))
    close(regression.loss, SumSquaredError()(names.network(names.x), targets))


def test_captum(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    network = run().network
    torch.save(network.state_dict(), tmp_path / "checkpoint")
    names = run("captum", checkpoint=str(tmp_path / "checkpoint"))
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
    plain = run(
        "captum",
        checkpoint=names.checkpoint,
        replace=("loss_fn=criterion", "loss_fn=lambda y, t: criterion(y, t)"),
    )
    says("captum", f"{ratio([names.influence], [plain.influence]):.0f} times too small")
    with pytest.raises(IndexError):
        run("captum", per_sample=None, replace=('reduction="none"', 'reduction="mean"'))


def test_monai() -> None:
    losses = pytest.importorskip("monai.losses")
    names = run("MONAI")
    y, t = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8)).float()
    theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True)(y, t)
    criterion = names.DiceCrossEntropy()
    assert criterion(y, t) == theirs
    with pytest.raises(ValueError, match="target") as caught:
        names.criterion(y, t)
    says("MONAI", f"ValueError: {caught.value}")
    whole = mean(lambda y: y, y, t.squeeze(1).long())
    total = names.summed(y, t.squeeze(1).long())
    dice = criterion.dice(y, t)
    says("MONAI", f"{total / whole:.0f} times", f"{100 * dice / (total + dice):.1f} %")


def test_segmentation_models() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    names = run("segmentation-models-pytorch")
    logits, masks = names.unet(names.images).detach(), names.masks.long()
    close(names.loss, F.cross_entropy(logits, masks, ignore_index=255))
    close(names.of_pixels(logits, names.masks), F.cross_entropy(logits, masks, ignore_index=255))
    says("segmentation-models-pytorch", f"{(masks != 255).sum()} times")
    close(names.binary, F.binary_cross_entropy_with_logits(names.z[:, 0], names.mask.float()))


def test_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    start = run()
    names = run("torchmetrics", **ignoring(start))
    whole = mean(names.network, names.x, names.t)
    close(names.mean, whole)
    of_means, unweighted = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
    for inputs, labels in names.loader:
        of_means.update(names.criterion(names.network(inputs), labels))
        unweighted.update(names.per_sample(names.network(inputs), labels))
    says("torchmetrics", f"({of_means.compute():.3f} for {whole:.3f})")
    says("torchmetrics", f"({unweighted.compute():.3f})")


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    start = run()
    names = run("Lightning's log", **ignoring(start))

    def logged_mean(criterion: nn.Module, loader: Any, *, says_size: bool = True) -> float:
        model = names.Classifier()
        model.criterion = criterion
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
        if not says_size:
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
    unsized = logged_mean(names.criterion, names.loader, says_size=False)
    says("Lightning's log", f"({unsized:.3f} for {whole:.3f})")
    factor = logged_mean(names.summed, start.loader) / mean(names.network, start.x, start.t)
    says("Lightning's log", f"{factor:.0f} times")


def test_ensembles() -> None:
    names = run("Ensembles")
    for place, network in enumerate(names.networks):
        whole = mean(network, names.x, names.t)
        close(names.losses[place], whole)
        for name, parameter in network.named_parameters():
            (gradient,) = torch.autograd.grad(whole, parameter, retain_graph=True)
            close(names.gradients[name][place], gradient)


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@needs_gloo
def test_pipelining() -> None:
    names = run("Pipelining", **ignoring(run()))
    network = run().network
    wanted = gradients(network, mean(network, names.x, names.t))
    close([parameter.grad for parameter in names.network.parameters()], wanted)
    names = run("Pipelining", replace=(", scale_grads=False", ""))
    whole = gradients(network, mean(network, names.x, names.t))
    factor = ratio([p.grad for p in names.network.parameters()], whole)
    assert factor == pytest.approx(1 / 2)


@needs_gloo
def test_precision_policies() -> None:
    target = torch.full((74, 1), 1000.3)
    names = run("Precision policies of FSDP2", dist=dist, target=target)
    rounded = [p.to_local().bfloat16() for p in names.model.parameters()]
    output = F.linear(names.x.bfloat16(), *rounded).float()
    close(names.loss, SumSquaredError(reduction="mean")(output, target))

    class Inside(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return target

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    inside = names.fully_shard(Inside(), mp_policy=names.policy)(names.x, target)
    assert f"{inside[0].item():g}" == "1000"


@needs_gloo
def test_loss_parallel() -> None:
    names = run("`loss_parallel`", dist=dist)
    y = names.network(names.x).detach().requires_grad_()
    close(names.gradient, torch.autograd.grad(mean(lambda y: y, y, names.soft), y)[0])


def test_names_of_a_checkpoint() -> None:
    names = run("`compile` and the names of a checkpoint")
    assert names.names == ["network.weight", "network.bias", "criterion.weight"]
    names.model["criterion"] = torch.compile(names.weighted)
    assert "criterion._orig_mod.weight" in names.model.state_dict()


def test_constants_of_aot_inductor(tmp_path: Path) -> None:
    names = run("AOTInductor's constants", path=str(tmp_path / "model.pt2"))
    close(names.loss, mean(names.network, names.x, names.t))


def test_mixup() -> None:
    pytest.importorskip("torchvision")
    names = run("MixUp and CutMix of torchvision")
    images, other = names.images, names.images.roll(1, 0)
    share = ((names.mixed - other) / (images - other)).median()
    label = names.labels.long()
    of_one = mean(lambda mixed: mixed.mean((2, 3)), names.mixed, label, reduction="none")
    of_other = mean(lambda mixed: mixed.mean((2, 3)), names.mixed, label.roll(1), reduction="none")
    close(names.loss, (share * of_one + (1 - share) * of_other).mean())
    for labels in (names.labels, names.labels.long().where(names.labels != 1, -100)):
        with pytest.raises(RuntimeError):
            names.v2.MixUp(num_classes=3)(names.images, labels)


def test_masks() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    names = run("Masks of torchvision", v2=v2)
    assert names.mask.unique().tolist() == [1, 255]


def test_hydra() -> None:
    pytest.importorskip("hydra")
    names = run("Hydra")
    probabilities = names.network(names.x).softmax(1)
    weight = torch.tensor([1.0, 2.0, 5.0])
    whole = CrossEntropyError(weight=weight, reduction="mean")(probabilities, names.t)
    assert names.from_file(probabilities, names.t) == whole


def test_averaged_models() -> None:
    names = run("Averaged models")
    close(names.loss, mean(names.network, names.x, names.t))


def test_errors_say_what_to_do() -> None:
    title = "What an error looks like"
    with pytest.raises(TypeError) as caught:
        SumSquaredError()(torch.zeros(74, 1), torch.zeros(74))
    says(title, f"TypeError: {caught.value}")
    with pytest.raises(TypeError) as caught:
        CrossEntropyError()(torch.arange(3), torch.rand(3, 3))
    says(title, f"TypeError: {caught.value}")


MODULES = {
    "torch": "torch",
    "Keras": "keras",
    "optax": "optax",
    "scikit-learn": "sklearn",
    "skorch": "skorch",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "MONAI": "monai.losses",
}


def test_all_of_the_migration_is_tested() -> None:
    assert {title for title, text in MIGRATION.items() if ">>>" in text} == {HALF, *MODULES}


@pytest.mark.parametrize("title", MODULES)
def test_migration(title: str) -> None:
    pytest.importorskip(MODULES[title])
    text = MIGRATION[HALF] + MIGRATION[title]
    test = doctest.DocTestParser().get_doctest(text, {}, title, "migration.md", 0)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert "".join(report) == ""
