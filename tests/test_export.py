"""Exported, ahead-of-time compiled and traced losses agree with the eager loss."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from samples import REDUCTIONS
from torch import Tensor, nn

from torchlosses import CrossEntropyError, LinearCrossEntropyError, SumSquaredError

# The compilers of torch 2.11 call functions that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")

ROWS = torch.export.Dim("rows")
DYNAMIC = ({0: ROWS},) * 4
DTYPES = {
    torch.float32: torch.int64,
    torch.float64: torch.int16,
    torch.float16: torch.int32,
    torch.bfloat16: torch.uint8,
}


class AllLosses(nn.Module):
    """All losses, without and with options, on soft targets and on class indices."""

    def __init__(self, plain: Sequence[Any], weighted: Sequence[Any]) -> None:
        """Reductions of the losses without options, and of those with options."""
        super().__init__()
        options: dict[str, Any] = {"label_smoothing": 0.1, "delta": 1e-3}
        options["weight"] = torch.linspace(0.5, 2, 5)
        self.plain, self.weighted = (
            nn.ModuleList(
                loss
                for reduction in reductions
                for loss in (
                    SumSquaredError(reduction=reduction),
                    CrossEntropyError(reduction=reduction, **named),
                    CrossEntropyError(reduction=reduction, from_logits=True, **named),
                )
            )
            for reductions, named in ((plain, {}), (weighted, options))
        )
        self.plain.append(CrossEntropyError(from_logits=True, delta=0))

    def forward(self, y: Tensor, soft: Tensor, label: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        losses = []
        for criterion in self.plain:
            losses += [criterion(y, soft), criterion(y, label)]
        for criterion in self.weighted:
            dense = w.unsqueeze(1) if isinstance(criterion, SumSquaredError) else w
            losses += [criterion(y, soft, sample_weight=dense)]
            losses += [criterion(y, label, sample_weight=w)]
        return tuple(losses)


ALL = (REDUCTIONS, REDUCTIONS)
FEW = (("none",), ("mean",))  # For slow compilers, and for dtypes other than float32.


def batch(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Every third label is ignored if its dtype is signed; one probability is 0."""
    y, soft = (torch.randn(rows, 5).softmax(1).to(dtype) for _ in range(2))
    y[-1, 0] = 0
    label = torch.randint(5, (rows,)).to(DTYPES[dtype])
    if label.dtype.is_signed:
        label[::3] = -100
    return y, soft, label, torch.rand(rows)


def assert_agrees(graph: Any, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """For batches of several sizes; and a sample with an invalid class is NaN."""
    for rows in (4, 1, 23):
        arguments = batch(rows, dtype)
        for actual, expected in zip(graph(*arguments), model(*arguments), strict=True):
            torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-5, atol=1e-6)
    y, soft, label, w = batch(4, dtype)
    label[1] = 5
    for number, loss in enumerate(graph(y, soft, label, w)):
        is_nan = torch.as_tensor(loss).isnan()
        is_index = number % 2 == 1
        assert is_nan.any() == is_index
        if is_nan.dim():
            assert is_nan.reshape(4, -1).any(1).tolist() == [False, is_index, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_with_a_dynamic_batch(dtype: torch.dtype) -> None:
    model = AllLosses(*(ALL if dtype == torch.float32 else FEW)).eval()
    exported = torch.export.export(model, batch(4, dtype), dynamic_shapes=DYNAMIC)
    operators = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    custom = [op for op in operators if not str(op).startswith(("aten.", "<built-in function"))]
    assert not custom, custom
    assert_agrees(exported.module(), model, dtype)


def test_exported_graphs_take_empty_batches() -> None:
    arguments = batch(4)
    empty = tuple(argument[:0] for argument in arguments)
    model = AllLosses(("sum", "mean"), ("batchmean", "mean")).eval()
    exported = torch.export.export(model, arguments, dynamic_shapes=DYNAMIC).module()
    exported_empty = torch.export.export(model, empty).module()
    for graph in (exported, exported_empty):
        for actual, expected in zip(graph(*empty), model(*empty), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("criterion", [SumSquaredError(), CrossEntropyError(reduction="mean")])
def test_strict_export(criterion: nn.Module) -> None:
    y, _, label, _ = batch(4)
    exported = torch.export.export(
        criterion, (y, label), dynamic_shapes=DYNAMIC[:2], strict=True
    ).module()
    for rows in (4, 7):
        y, _, label, _ = batch(rows)
        torch.testing.assert_close(exported(y, label), criterion(y, label))


def test_aot_inductor(tmp_path: Path) -> None:
    model = AllLosses(("batchmean", "none"), ("mean",)).eval()
    for from_logits in (False, True):
        options: Any = {"from_logits": from_logits, "delta": 1e-30, "label_smoothing": 1e-9}
        model.plain.append(CrossEntropyError(**options))
    exported = torch.export.export(model, batch(4), dynamic_shapes=DYNAMIC)
    # torch documents these functions under these private names.
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "losses.pt2")
    )
    assert_agrees(torch._inductor.aoti_load_package(path), model)


def run_by_onnx(model: nn.Module, arguments: tuple[Tensor, ...], dynamic: Any = None) -> Any:
    """The exported model as a function that runs in ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        # The exporter warns that all four arguments have the same number of rows.
        warnings.filterwarnings("ignore", "# The axis name: rows")
        program: Any = torch.onnx.export(
            model, arguments, dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operators.
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    inputs = [input.name for input in session.get_inputs()]

    def graph(*arguments: Tensor) -> Any:
        arrays = (argument.numpy() for argument in arguments)
        return session.run(None, dict(zip(inputs, arrays, strict=True)))

    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx(dtype: torch.dtype) -> None:
    model = AllLosses(
        *((("mean", "batchmean"), ("none",)) if dtype == torch.float32 else FEW)
    ).eval()
    assert_agrees(run_by_onnx(model, batch(4, dtype), DYNAMIC), model, dtype)


CLASSES = 200


class TinyOptions(nn.Module):
    """Losses with δ and ε so small that they, or 1 − ε, may be lost, on inputs that show it.

    In the rows the right class has probability 0, probability 1 and a random one; the last row is
    ignored. The linear layer is the identity.
    """

    def __init__(self, numbers: Sequence[tuple[float, float]], reduction: Any) -> None:
        """Losses for each pair (δ, ε)."""
        super().__init__()
        self.rounding = 2 * max(delta for delta, _ in numbers)
        weight = torch.linspace(0.5, 2, CLASSES)
        self.losses = nn.ModuleList()
        for number, (delta, smoothing) in enumerate(numbers):
            options: dict[str, Any] = {"delta": delta, "label_smoothing": smoothing}
            options |= {"reduction": reduction, "weight": weight if number % 2 else None}
            layer = LinearCrossEntropyError(CLASSES, CLASSES, bias=True, **options)
            nn.init.eye_(layer.linear.weight)
            nn.init.zeros_(layer.linear.bias)
            for loss in (
                CrossEntropyError(**options),
                CrossEntropyError(from_logits=True, **options),
                layer,
            ):
                self.losses.append(loss)
        self.requires_grad_(False)

    def forward(self, x: Tensor, soft: Tensor, label: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x.softmax(1)
        losses = [SumSquaredError(reduction="none")(y, label)]
        for number, criterion in enumerate(self.losses):
            input = y if number % 3 == 0 else x
            weights = w if number % 4 == 0 else None
            losses += [criterion(input, t, sample_weight=weights) for t in (soft, label)]
        return tuple(losses)

    @staticmethod
    def batch() -> tuple[Tensor, ...]:
        label = torch.tensor([0, 1, 2, -100])
        x = torch.full((4, CLASSES), -200.0)
        x[0, 1] = x[1, 1] = 0
        x[2] = torch.randn(CLASSES)
        soft = torch.nn.functional.one_hot(label.clamp(min=0), CLASSES).float()
        return x, soft, label, torch.rand(4)

    def assert_agrees(self, graph: Any) -> None:
        """Tight enough to see 1 − ε. At p = 1, log(1 + δ) may be δ, or 0 if 1 + δ rounds to 1."""
        arguments = self.batch()
        for actual, expected in zip(graph(*arguments), self(*arguments), strict=True):
            torch.testing.assert_close(
                torch.as_tensor(actual), expected, rtol=2e-6, atol=self.rounding
            )


# The optimizer of torch.onnx.export replaces scalars of at most 1e-8 by 0, and those within 1e-5 of
# 1 by 1. Each pair (δ, ε) makes six losses.
TINY = [
    ([(delta, 0.0) for delta in (1e-7, 1e-8, 1e-12, 1e-30)], "none"),
    ([(1e-30, smoothing) for smoothing in (9e-6, 1e-7, 1e-8, 1e-9)], "none"),
    ([(1e-8, 0.0), (1e-40, 1e-6)], "mean"),
]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_numbers_are_not_scalars(strict: bool) -> None:
    model = TinyOptions([(1e-30, 9e-6)], "none").eval()
    exported = torch.export.export(model, model.batch(), strict=strict)
    model.assert_agrees(exported.module())
    for node in exported.graph.nodes:
        if node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor):
            operands = [getattr(operand, "meta", {}).get("val") for operand in node.args]
            assert all(isinstance(operand, Tensor) and operand.dim() for operand in operands), node


@pytest.mark.parametrize(("numbers", "reduction"), TINY)
def test_onnx_keeps_tiny_numbers(numbers: Any, reduction: Any) -> None:
    model = TinyOptions(numbers, reduction).eval()
    model.assert_agrees(run_by_onnx(model, model.batch()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_trace(dtype: torch.dtype, tmp_path: Path) -> None:
    model = AllLosses(*(ALL if dtype == torch.float32 else FEW)).eval()
    with warnings.catch_warnings():
        # The tracer warns of Python branches on shapes.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(model, batch(4, dtype))
    torch.jit.save(traced, tmp_path / "losses.pt")
    assert_agrees(torch.jit.load(tmp_path / "losses.pt"), model, dtype)
