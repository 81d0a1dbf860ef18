"""Invalid arguments raise errors that name them, and arguments are never written to."""

import functools
import re
import signal
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from samples import SAMPLES, Sample
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from torchlosses import CrossEntropyError, SumSquaredError, checks
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

BOTH: list[Callable[..., Tensor]] = [sum_squared_error, cross_entropy_error]
BOTH_MODULES: list[Callable[..., nn.Module]] = [SumSquaredError, CrossEntropyError]


def words(*texts: object) -> str:
    """A regular expression that matches the texts in this order."""
    return ".*".join(re.escape(str(text)) for text in texts)


def y(*shape: int, device: str = "cpu") -> Tensor:
    return torch.full(shape, 0.2, device=device)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((3,), (3, 1)), ((4, 5), (5,)), ((4, 5), (5, 4)), ((4, 5), (1, 5)), ((4, 5), ()), ((), (1,))],
)
def test_target_shape_that_does_not_fit(
    loss: Any, shape: tuple[int, ...], target_shape: tuple[int, ...], device: str
) -> None:
    for dtype in (torch.float32, torch.int64):
        target = torch.zeros(target_shape, dtype=dtype, device=device)
        with pytest.raises(ValueError, match=words("target", target_shape, shape, "expected")):
            loss(y(*shape, device=device), target)


@pytest.mark.parametrize("loss", BOTH)
def test_error_names_the_class_dimension_that_would_fit(loss: Any, device: str) -> None:
    input, target = y(2, 5, 10, device=device), torch.zeros(2, 5, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=words("dimension 1", (2, 10), "dim=2")):
        loss(input, target)
    assert loss(input, target, dim=2).isfinite()
    with pytest.raises(ValueError, match=r"(?!.*dim=)"):
        loss(input, target[:1])


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize(("shape", "samples"), [((4, 1), (4,)), ((4, 5, 2), (4, 2)), ((4,), ())])
def test_target_that_is_not_an_integer_where_only_class_indices_fit(
    loss: Any, dtype: torch.dtype, shape: tuple[int, ...], samples: tuple[int, ...], device: str
) -> None:
    target = torch.zeros(samples, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=words("target", dtype, samples, shape, "unsqueeze")):
        loss(y(*shape, device=device), target)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize(("shape", "dim"), [((4, 5), 2), ((4, 5), -3), ((4,), 1), ((), 1)])
def test_dim_out_of_range(loss: Any, shape: tuple[int, ...], dim: int, device: str) -> None:
    with pytest.raises(ValueError, match=words("dim", dim, shape, "expected")):
        loss(y(*shape, device=device), y(*shape, device=device), dim=dim)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_input_that_is_not_floating(loss: Any, dtype: torch.dtype, device: str) -> None:
    with pytest.raises(TypeError, match=words("input", dtype, "expected")):
        loss(y(4, 5, device=device).to(dtype), y(4, 5, device=device))


@pytest.mark.parametrize("loss", BOTH)
def test_swapped_arguments(loss: Any, device: str) -> None:
    label, input = torch.zeros(4, dtype=torch.int64, device=device), y(4, 5, device=device)
    with pytest.raises(TypeError, match=words("input", torch.int64, "swapped?")):
        loss(label, input)
    with pytest.raises(ValueError, match=words("target", (4, 5), "swapped?")):
        loss(label.to(input.dtype), input)
    with pytest.raises(ValueError, match=r"class indices$"):  # A forgotten squeeze.
        loss(y(4, device=device), y(4, 1, device=device))


@pytest.mark.parametrize("loss", BOTH)
def test_complex_target(loss: Any, device: str) -> None:
    for shape in ((4, 5), (4,)):
        with pytest.raises(TypeError, match=words("target", torch.complex64, "expected")):
            loss(y(4, 5, device=device), y(*shape, device=device).to(torch.complex64))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize("loss", BOTH)
def test_quantized_target(loss: Any) -> None:
    for shape in ((4, 5), (4,)):
        target = torch.quantize_per_tensor(torch.ones(shape), 1.0, 0, torch.quint8)
        with pytest.raises(TypeError, match=words("target", torch.quint8, "expected")):
            loss(y(4, 5), target)


@pytest.mark.parametrize("loss", BOTH)
def test_not_a_tensor(loss: Any) -> None:
    with pytest.raises(TypeError, match=words("input", "list", "expected a torch.Tensor")):
        loss([0.1], y(1))
    with pytest.raises(TypeError, match=words("target", "int", "expected a torch.Tensor")):
        loss(y(1), 0)
    with pytest.raises(TypeError, match=words("sample_weight", "float", "expected a torch.Tensor")):
        loss(y(1), y(1), sample_weight=1.0)
    with pytest.raises(TypeError, match=words("input", "NoneType", "expected a torch.Tensor")):
        torch.compile(loss, backend="eager")(None, None)


@pytest.mark.parametrize("loss", BOTH)
def test_different_devices(loss: Any) -> None:
    meta = torch.zeros(4, 5, device="meta")
    with pytest.raises(ValueError, match=words("target", "meta", "cpu")):
        loss(y(4, 5), meta)
    with pytest.raises(ValueError, match=words("sample_weight", "meta", "cpu")):
        loss(y(4, 5), y(4, 5), sample_weight=meta[:, 0])
    with pytest.raises(ValueError, match=words("weight", "meta", "cpu")):
        cross_entropy_error(y(4, 5), y(4, 5), weight=meta[0])


def from_logits(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return cross_entropy_error(input, target, from_logits=True, **options)


def through_layer(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The linear loss with the identity as the layer's weight."""
    return linear_cross_entropy_error(
        input, torch.eye(input.shape[-1]).to(input), target, **options
    )


ALL: list[Callable[..., Tensor]] = [*BOTH, from_logits, through_layer]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_ignore_index_with_a_dense_target(loss: Any, dtype: torch.dtype, device: str) -> None:
    input, target = y(4, 5, device=device), torch.zeros(4, 5, device=device).to(dtype)
    message = words("ignore_index", 255, (4, 5), "expected class indices", "sample_weight")
    expected = loss(input, target)
    assert loss(input, target, ignore_index=-100) == expected
    for _ in range(2):  # The second call could come from the cache.
        with pytest.raises(ValueError, match=message):
            loss(input, target, ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=words("ignore_index", 255)):
        compiled(input, target, ignore_index=255)
    index = torch.zeros(4, dtype=torch.int64, device=device)
    assert loss(input, index, ignore_index=255) == loss(input, index)


def test_a_graph_takes_dim_as_a_constant(device: str) -> None:
    y, t = torch.randn(4, 1, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    torch.compiler.reset()

    def loss(y: Tensor, dim: int) -> Tensor:
        return cross_entropy_error(y, t, from_logits=True, dim=dim)

    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend="eager")
    for dim in (1, -1):
        with pytest.warns(UserWarning, match="one class, in dimension 1"):
            compiled(y, dim)
        torch.compiler.reset()


@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("is_linear", [False, True])
def test_logits_of_one_class(is_linear: bool, is_index: bool, device: str) -> None:
    loss = functools.partial(cross_entropy_error, from_logits=True)  # Warnings name the caller.
    if is_linear:
        layer = torch.ones(1, 1, device=device)
        loss = functools.partial(linear_cross_entropy_error, linear_weight=layer)
    input = torch.randn(4, 1, device=device, requires_grad=True)
    target = torch.ones(4, 1, device=device)
    if is_index:
        target = torch.zeros(4, dtype=torch.int64, device=device)
    message = words("input", "one class, in dimension 1", "torch.cat", "BCEWithLogitsLoss")
    if is_linear:
        message = words("linear_weight", "one class", "nn.Linear", "BCEWithLogitsLoss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            result = loss(input, target=target)
        loss(input, target=target)
    assert [re.search(message, str(w.message)) is not None for w in caught] == [True] * 2
    assert {w.filename for w in caught} == {__file__}
    assert caught[0].lineno != caught[1].lineno
    assert result.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(result, input)
    assert not gradient.any()
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(loss, fullgraph=True, backend="eager")(input, target=target)
    assert len([w for w in caught if re.search(message, str(w.message))]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = torch.zeros(4, dtype=torch.int64, device=device)
        from_logits(torch.randn(4, 2, device=device), index)
        through_layer(torch.randn(4, 2, device=device), index)
        cross_entropy_error(input.sigmoid(), target)
        sum_squared_error(input, target)


def test_remedies_for_logits_of_one_class(device: str) -> None:
    z = torch.randn(4, 1, 3, device=device, dtype=torch.float64)
    target = torch.randint(2, (4, 1, 3), device=device)
    two = torch.cat([torch.zeros_like(z), z], 1)
    loss = CrossEntropyError(from_logits=True, delta=0, reduction="mean")(two, target.squeeze(1))
    torch.testing.assert_close(loss, nn.BCEWithLogitsLoss()(z, target.double()))


@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(5, 1), torch.ones(()), torch.ones(1)], ids=str
)
def test_class_weight_of_a_wrong_shape(weight: Tensor, device: str) -> None:
    shape = tuple(weight.shape)
    with pytest.raises(ValueError, match=words("weight", shape, (4, 5), "expected", (5,))):
        cross_entropy_error(
            y(4, 5, device=device), y(4, 5, device=device), weight=weight.to(device)
        )
    if weight.dim() != 1:
        with pytest.raises(ValueError, match=words("weight", shape, "(C,)")):
            CrossEntropyError(weight=weight)


def test_class_weight_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match=words("weight", "list", "torch.Tensor")):
        CrossEntropyError(weight=[1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=words("weight", "complex64", "real")):
        CrossEntropyError(weight=torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(3,), (5, 4), (1, 4, 5), (2, 1)])
def test_sample_weight_that_does_not_broadcast(shape: tuple[int, ...], device: str) -> None:
    input, w = y(4, 5, device=device), torch.ones(shape, device=device)
    with pytest.raises(ValueError, match=words("sample_weight", shape, "(4, 5)")):
        sum_squared_error(input, input, sample_weight=w)
    with pytest.raises(ValueError, match=words("sample_weight", shape, "(4,)")):
        cross_entropy_error(input, input, sample_weight=w)
    classes = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=words("sample_weight", shape, "(4,)")):
        sum_squared_error(input, classes, sample_weight=w)


@pytest.mark.parametrize("make", [*BOTH_MODULES])
def test_options_of_both_modules(make: Any) -> None:
    with pytest.raises(ValueError, match=words("reduction", "'avg'", "'sum', 'mean', 'batchmean'")):
        make(reduction="avg")
    with pytest.raises(TypeError, match=words("dim", "'1'", "int")):
        make(dim="1")
    with pytest.raises(TypeError, match=words("ignore_index", "None", "int")):
        make(ignore_index=None)
    with pytest.raises(TypeError, match=words("dim", "True", "int")):
        make(dim=True)
    for ignore_index in (2**70, -(2**63) - 1):
        with pytest.raises(ValueError, match=words("ignore_index", ignore_index, "64 bits")):
            make(ignore_index=ignore_index)
    with pytest.raises(TypeError):
        make("mean")  # Options are keyword-only.


@pytest.mark.parametrize(
    "make", [CrossEntropyError, lambda **o: cross_entropy_error(y(2), y(2), **o)]
)
def test_options_of_cross_entropy(make: Any) -> None:
    for delta in (-1e-9, float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=words("delta", "expected a finite number")):
            make(delta=delta)
    for label_smoothing in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=words("label_smoothing", label_smoothing, "[0, 1]")):
            make(label_smoothing=label_smoothing)
    for option in ("delta", "label_smoothing"):
        with pytest.raises(TypeError, match=words(option, "'0.1'", "number")):
            make(**{option: "0.1"})
        with pytest.raises(TypeError, match=words(option, "True", "number")):
            make(**{option: True})
    for from_logits in ("no", 1, None):
        with pytest.raises(TypeError, match=words("from_logits", from_logits, "bool")):
            make(from_logits=from_logits)


def test_options_may_be_numpy_numbers() -> None:
    options: dict[str, Any] = {
        "delta": np.float32(0.5), "label_smoothing": np.float64(0.1),
        "ignore_index": np.int64(3), "dim": np.int16(1),
    }  # fmt: skip
    plain = {name: value.item() for name, value in options.items()}
    input, target = torch.rand(4, 5), torch.tensor([0, 3, 1, 2])
    criterion = CrossEntropyError(**options)
    assert repr(criterion) == repr(CrossEntropyError(**plain))
    expected = cross_entropy_error(input, target, **plain)
    assert criterion(input, target) == cross_entropy_error(input, target, **options) == expected
    exact = CrossEntropyError(delta=Fraction(1, 2))  # type: ignore[arg-type]
    assert exact(input, target) == cross_entropy_error(input, target, delta=0.5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("loss", BOTH)
def test_tensors_that_are_not_dense(loss: Any) -> None:
    dense = torch.rand(2, 3)
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([dense, dense[:1]], layout=layout)
        with pytest.raises(TypeError, match=words("input", "nested", "to_padded_tensor")):
            loss(nested, nested)
        with pytest.raises(TypeError, match=words("target", "nested")):
            loss(dense, nested)
        with pytest.raises(TypeError, match=words("input", "nested")):
            torch.compile(loss, backend="eager")(nested, dense)
    with pytest.raises(TypeError, match=words("input", "torch.sparse_coo", "to_dense")):
        loss(dense.to_sparse(), dense)
    with pytest.raises(TypeError, match=words("target", "torch.sparse_coo")):
        loss(dense, dense.to_sparse())
    with pytest.raises(TypeError, match=words("input", "torch._mkldnn")):
        torch.compile(loss, backend="eager")(dense.to_mkldnn(), dense)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("bad", [5, -1, -99, 2**40])
def test_class_out_of_range_on_the_cpu(loss: Any, bad: int, path: str) -> None:
    target = torch.tensor([[0, -100], [bad, 4]])
    with pytest.raises(IndexError, match=words("target", bad, (1, 0), "0 to 4", "-100")):
        loss(y(2, 5, 2), target)
    with pytest.raises(IndexError, match=words("target", bad, "()")):
        loss(y(5), torch.tensor(bad))
    with pytest.raises(IndexError, match=words("target", bad, (1, 0))):
        torch.func.grad(lambda input: loss(input, target))(y(2, 5, 2))


@pytest.mark.parametrize("loss", BOTH)
def test_unsigned_class_out_of_range(loss: Any, path: str) -> None:
    for dtype, bad in ((torch.uint8, 255), (torch.uint64, 2**64 - 100), (torch.uint64, 2**63)):
        for ignore_index in (-100, 2**63 - 1):
            with pytest.raises(IndexError, match=words("target", bad, "(1,)")):
                loss(y(2, 5), torch.tensor([0, bad], dtype=dtype), ignore_index=ignore_index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", BOTH)
def test_class_out_of_range_on_cuda_is_nan(loss: Any) -> None:
    input = y(3, 5, device="cuda").requires_grad_()
    value = loss(input, torch.tensor([1, 5, 2], device="cuda"), reduction="none")
    assert value.reshape(3, -1).isnan().all(1).tolist() == [False, True, False]
    value.sum().backward()
    assert input.grad is not None
    assert input.grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_arguments_are_never_written_to(sample: Sample, device: str) -> None:
    input, target, options = sample.tensors(torch.float32, device)
    tensors = [input, target, *(value for value in options.values() if isinstance(value, Tensor))]
    before = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    input.requires_grad_()
    sample.function(input, target, **options).sum().backward()
    assert [tensor._version for tensor in tensors] == versions
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())


def test_a_call_that_differs_from_a_cached_one_is_checked() -> None:
    """A kernel call that repeats another is not checked again; one that differs at all is."""
    input, index = torch.rand(4, 4), torch.tensor([1, 2, 3, 0])
    expected = cross_entropy_error(input, index)
    for target, error in (
        (index.float(), TypeError),
        (index[:3], ValueError),
        (index.to("meta"), ValueError),
        (index.to_sparse(), TypeError),
    ):
        with pytest.raises(error, match="target: got"):
            cross_entropy_error(input, target)
    for changed, error in (
        (input.to_sparse(), TypeError),
        (input.to(torch.complex64), TypeError),
        (input[:, :, None], ValueError),
        (input.to("meta"), ValueError),
    ):
        with pytest.raises(error):
            cross_entropy_error(changed, index)
    assert sum_squared_error(input, index) != expected
    assert cross_entropy_error(input.double(), index).dtype == torch.float64
    assert cross_entropy_error(input, input).dtype == torch.float32
    assert cross_entropy_error(input, input.double()).dtype == torch.float64
    for options in (
        {"reduction": "mean"}, {"delta": 1.0}, {"from_logits": True}, {"dim": 0},
        {"ignore_index": 1}, {"label_smoothing": 0.5},
    ):  # fmt: skip
        assert not torch.equal(cross_entropy_error(input, index, **options), expected)
    ones: dict[str, Any] = {"dim": 1, "ignore_index": 1, "delta": 1.0, "label_smoothing": 1.0}
    cross_entropy_error(input, index, **ones)
    for name in ones:  # True == 1 == 1.0, and they have the same hash.
        with pytest.raises(TypeError, match=f"{name}: got True"):
            cross_entropy_error(input, index, **ones | {name: True})
    for name in ("dim", "ignore_index"):
        with pytest.raises(TypeError, match=f"{name}: got 1.0"):
            cross_entropy_error(input, index, **ones | {name: 1.0})
    cross_entropy_error(input, index, from_logits=True)
    wrong: Any = 1
    with pytest.raises(TypeError, match="from_logits: got 1"):
        cross_entropy_error(input, index, from_logits=wrong)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_weights_that_differ_from_cached_ones_are_checked(name: str, requires_grad: bool) -> None:
    def loss(weight: Tensor | None) -> Tensor:
        weights: dict[str, Any] = {name: weight}
        return cross_entropy_error(input, index, **weights)

    input, index = torch.rand(4, 4, requires_grad=requires_grad), torch.tensor([1, 2, 3, 0])
    expected, halved = loss(torch.ones(4)), loss(torch.full((4,), 0.5))
    torch.testing.assert_close(expected / 2, halved)
    torch.testing.assert_close(loss(torch.ones(4).double()), expected)
    torch.testing.assert_close(loss(torch.ones(1).expand(4)), expected)
    assert torch.equal(loss(None), expected)
    for weight in (torch.ones(3), torch.ones(4, device="meta")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            loss(weight)
    learned = torch.ones(4, requires_grad=True)
    loss(learned).backward()
    assert learned.grad is not None
    torch.testing.assert_close(learned.grad.sum(), expected.detach())


class RaisesOnce(TorchFunctionMode):
    """Raises at the first torch operation, as a signal handler may at any."""

    has_raised = False

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if not self.has_raised:
            self.has_raised = True
            raise ValueError("interrupted")
        return function(*arguments, **(options or {}))


def test_foreign_errors_propagate_from_a_cached_call() -> None:
    input, index = torch.rand(4, 4), torch.tensor([1, 2, 3, 0])
    for _ in range(2):
        cross_entropy_error(input, index)
        with RaisesOnce(), pytest.raises(ValueError, match="interrupted"):
            cross_entropy_error(input, index)


@pytest.mark.parametrize("operation", ["aminmax", "all"])
def test_errors_of_a_signal_handler_propagate_from_the_check_of_labels(
    operation: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(number: int, frame: Any) -> None:
        raise RuntimeError("interrupted")

    def interrupt(self: Tensor) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the handler has not run")

    if operation == "aminmax":
        monkeypatch.setattr(torch, "aminmax", interrupt)
    else:
        monkeypatch.setattr(Tensor, "__bool__", interrupt)
    before = signal.signal(signal.SIGINT, handle)
    index = torch.tensor([1, -100, 3, 0])
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            checks.check_classes(index, 4, -100)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bad_class_is_an_error_with_any_default_device() -> None:
    input, index = torch.rand(4, 4), torch.tensor([1, 9, 3, 0])
    with torch.device("meta"), pytest.raises(IndexError, match=r"class 9 at position \(1,\)"):
        cross_entropy_error(input, index)


def test_a_cached_call_respects_requires_grad_and_no_grad() -> None:
    y, t = torch.rand(4, 4), torch.rand(4, 4)
    for input, target in ((y, t), (y.clone().requires_grad_(), t), (y, t.clone().requires_grad_())):
        for _ in range(2):
            expected = input.requires_grad or target.requires_grad
            assert sum_squared_error(input, target).requires_grad == expected
            with torch.no_grad():
                assert not sum_squared_error(input, target).requires_grad


def test_a_cached_call_uses_the_formula_where_kernels_do_not_apply() -> None:
    input, index = torch.rand(4, 4), torch.tensor([1, 2, 3, 0])
    expected = cross_entropy_error(input, index)
    negative = torch.complex(input, -input).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(cross_entropy_error(negative, index), expected)
    # Private: no public function makes a contiguous negative view, or the zero tensors without
    # storage that autograd makes of some gradients.
    torch.testing.assert_close(cross_entropy_error(torch._neg_view(-input), index), expected)
    zeros = torch._efficientzerotensor(4, 4)
    torch.testing.assert_close(
        cross_entropy_error(zeros, index), cross_entropy_error(torch.zeros(4, 4), index)
    )
    weight = torch._efficientzerotensor(4)
    weighted: list[dict[str, Any]] = [{"weight": weight}, {"sample_weight": weight}]
    for options in weighted:
        assert cross_entropy_error(input, index, **options) == 0
    losses = torch.vmap(cross_entropy_error)(input[None], index[None])
    torch.testing.assert_close(losses, expected[None])
    tangent = torch.func.jvp(lambda y: cross_entropy_error(y, index), (input,), (input,))[1]
    torch.testing.assert_close(tangent, torch.tensor(-4.0))
    with forward_ad.dual_level():
        dual = cross_entropy_error(forward_ad.make_dual(input, input), index)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, torch.tensor(-4.0))
    trace = make_fx(lambda y, t: cross_entropy_error(y, t), pre_dispatch=True)
    torch.testing.assert_close(trace(input, index)(input, index), expected)
    subclass: Tensor = input.as_subclass(type("Subclass", (Tensor,), {}))
    assert type(cross_entropy_error(subclass, index)) is type(subclass)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(cross_entropy_error(input, index), FakeTensor)
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        pytest.raises(ValueError, match="not a probability"),
    ):
        cross_entropy_error(input + 1, index)
