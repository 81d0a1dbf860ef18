"""The pass over the data is taken where it serves, and is the formula in other steps."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from samples import SAMPLES
from test_parity import assert_matches_reference
from torch import Tensor
from torch.autograd import forward_ad

from torchlosses import fused
from torchlosses.functional import cross_entropy_error, sum_squared_error
from torchlosses.kernels import cpu

SHAPE = (256, 128)


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that are called meanwhile."""
    called: list[str] = []

    def spy(name: str) -> Any:
        kernel = getattr(cpu, name)

        def call(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return kernel(*arguments, **options)

        return mock.patch.object(cpu, name, call)

    with spy("squared_error"), spy("cross_entropy"), spy("cross_entropy_of_class"):
        yield called


def test_every_kernel_serves() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    soft, index = torch.rand(SHAPE), torch.randint(SHAPE[1], SHAPE[:1])
    with counted() as called:
        for target in (soft, index):
            sum_squared_error(y, target)
            cross_entropy_error(y, target)
            cross_entropy_error(y, target, from_logits=True)
        cross_entropy_error(y, index, label_smoothing=0.1)
    assert called == [
        "squared_error", "cross_entropy", "cross_entropy",
        "squared_error", "cross_entropy_of_class", "cross_entropy_of_class", "cross_entropy",
    ]  # fmt: skip


def test_the_formula_serves_the_rest() -> None:
    y, target = torch.rand(SHAPE), torch.rand(SHAPE)
    assert fused.find_kernels(y, target) is cpu
    weight = torch.rand(SHAPE[1])
    assert fused.find_kernels(y, target, weight, None) is cpu
    assert fused.find_kernels(y, target, weight.requires_grad_()) is None
    assert fused.find_kernels(y[:0], target[:0]) is None
    assert fused.find_kernels(y.to(torch.float8_e5m2), target) is None
    assert fused.find_kernels(y.T, target.T) is None
    assert fused.find_kernels(y.as_subclass(type("Mine", (Tensor,), {})), target) is None
    assert fused.find_kernels(y.to("meta"), target.to("meta")) is None
    with forward_ad.dual_level():
        assert fused.find_kernels(y, target) is None
    served = []

    def ask(y: Tensor) -> Tensor:
        served.append(fused.find_kernels(y, target))
        return y.sum()

    torch.vmap(ask)(y[None])
    torch.func.grad(ask)(y)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        ask(y)
    assert served == [None] * 3


def test_detectors_are_there() -> None:
    """Private to torch; without one every call would go to the formula, and nobody would know."""
    assert fused._is_transformed is not fused._unknown
    assert fused._count_modes is not fused._unknown
    assert forward_ad._current_level == -1


@pytest.mark.parametrize("block", [1, 7, 64])
def test_any_size_of_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK", block)
    for sample in SAMPLES:
        assert_matches_reference(sample, torch.float64, "cpu")


FORMS: list[tuple[Any, dict[str, Any]]] = [
    (sum_squared_error, {}),
    (cross_entropy_error, {}),
    (cross_entropy_error, {"from_logits": True}),
    (cross_entropy_error, {"from_logits": True, "delta": 0}),
    (cross_entropy_error, {"from_logits": True, "label_smoothing": 0.1}),
]
BLOCK = cpu.BLOCK
SIZES: list[tuple[int, ...]] = [(1, BLOCK - 1), (1, BLOCK), (1, BLOCK + 1)]
SIZES += [(BLOCK // 8 - 1, 8), (BLOCK // 8, 8), (BLOCK // 8 + 1, 8), (3, 257, 1031), (70_001, 11)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_index", [False, True])
def test_sizes_around_a_block(shape: tuple[int, ...], dtype: torch.dtype, is_index: bool) -> None:
    y = torch.rand(shape).to(dtype)
    target = torch.rand(shape).to(dtype)
    if is_index:
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
    exact_target = target if is_index else target.double()
    # A softmax over half a million classes has torch's own error, which is another matter.
    for loss, options in FORMS[: 2 if shape[0] == 1 else None]:
        leaf, exact_leaf = y.requires_grad_(), y.detach().double().requires_grad_()
        with counted() as called:
            value = loss(leaf, target, **options)
        assert called
        exact = loss(exact_leaf, exact_target, **options)
        torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=1e-6)
        (grad,), (exact_grad,) = (
            torch.autograd.grad(e, x) for e, x in ((value, leaf), (exact, exact_leaf))
        )
        rtol = 2e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=1e-6)


def test_nothing_is_made_that_no_one_asked_for() -> None:
    y, target = torch.rand(SHAPE), torch.rand(SHAPE)
    asked = []

    def squared_error(*arguments: Any, needs: tuple[bool, bool], **options: Any) -> Any:
        asked.append(needs)
        return kernel(*arguments, needs=needs, **options)

    kernel = cpu.squared_error
    with mock.patch.object(cpu, "squared_error", squared_error):
        sum_squared_error(y, target)
        sum_squared_error(y.requires_grad_(), target)
        sum_squared_error(y, target.requires_grad_())
        with torch.no_grad():
            sum_squared_error(y, target)
    assert asked == [(False, False), (True, False), (True, True), (False, False)]


def test_backward_again_gives_the_same_bits() -> None:
    for dtype in fused.DTYPES:
        y = torch.rand(SHAPE).to(dtype).requires_grad_()
        for loss, options in FORMS:
            value = loss(y, torch.randint(SHAPE[1], SHAPE[:1]), reduction="mean", **options)
            factor = torch.tensor(1.7, dtype=value.dtype)
            first, second = (
                torch.autograd.grad(value, y, factor, retain_graph=True)[0] for _ in range(2)
            )
            assert torch.equal(first, second)


def test_batched_upstream_gradients() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    losses = cross_entropy_error(y, torch.rand(SHAPE), reduction="none")
    rows = torch.eye(SHAPE[0])[:3]
    batched = torch.autograd.grad(losses, y, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, grad in zip(rows, batched, strict=True):
        expected = torch.autograd.grad(losses, y, row, retain_graph=True)[0]
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("form", ["sse", "probabilities", "logits"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_scaler_lifts_what_float16_cannot_hold(form: str, reduction: str) -> None:
    """A gradient of 1e-8 is 0 in float16, and times a scaler's factor it is not."""
    y = (1e-3 + 1e-3 * torch.rand(1, 2000)).half().requires_grad_()
    loss: Any = sum_squared_error if form == "sse" else cross_entropy_error
    options: dict[str, Any] = {} if form == "sse" else {"from_logits": form == "logits"}
    weight = torch.tensor([[1e-8]] if form == "sse" else [1e-8])
    target = torch.full_like(y, 1e-3)
    factor = 2.0**24

    def scaled(y: Tensor) -> Tensor:
        value = loss(y, target.to(y.dtype), reduction=reduction, sample_weight=weight, **options)
        (grad,) = torch.autograd.grad(value.sum() * factor, y)
        return grad

    exact = scaled(y.detach().double().requires_grad_())
    assert (exact / factor).abs().max() < 2**-25
    with counted() as called:
        torch.testing.assert_close(scaled(y).double(), exact, rtol=2**-10, atol=2**-24)
    assert called


def test_an_argument_changed_before_backward_again_is_an_error() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    target = torch.rand(SHAPE)
    loss = sum_squared_error(y, target)
    (expected,) = torch.autograd.grad(loss, y, retain_graph=True)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # The first time backward there is nothing to compute, and so nothing to get wrong.
    target.copy_(y.detach() - expected)
    loss = sum_squared_error(y, target)
    target.zero_()
    loss.backward()
    torch.testing.assert_close(y.grad, expected)


def test_backward_twice_without_asking_is_an_error() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    loss = sum_squared_error(y, torch.rand(SHAPE))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.skipif(cpu.HUGE_PAGES is None, reason="the advice is Linux's")
def test_fresh_memory_is_advised_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []
    assert cpu._advise is not None
    libc = cpu._advise

    def advise(start: Any, length: Any, advice: int) -> int:
        advised.append((start.value, length.value))
        return libc(start, length, advice)

    monkeypatch.setattr(cpu, "_advise", advise)
    for extra in (0, 1, 1000):
        tensor = cpu._empty(torch.empty(cpu.FRESH // 4 + extra), torch.float32)
        start, length = advised.pop()
        assert start % cpu.HUGE_PAGE == length % cpu.HUGE_PAGE == 0
        assert tensor.data_ptr() <= start < tensor.data_ptr() + cpu.HUGE_PAGE
        assert length >= tensor.nbytes - 2 * cpu.HUGE_PAGE
        assert start + length <= tensor.data_ptr() + tensor.nbytes
    cpu._empty(torch.empty(cpu.FRESH // 4 - 1), torch.float32)
    assert not advised
    assert libc(ctypes.c_void_p(tensor.data_ptr() + 1), 1, cpu.HUGE_PAGES) == -1  # It is real.


@pytest.mark.parametrize("name", ["squares", "probabilities", "logits"])
def test_sums_are_as_accurate_as_those_of_torch(name: str) -> None:
    x, t = torch.randn(2**13, 2**12), torch.randn(2**13, 2**12)
    y, index = x.softmax(1), torch.randint(2**12, (2**13,))
    ours, theirs, exact = {
        "squares": lambda: (
            sum_squared_error(x, t), F.mse_loss(x, t, reduction="sum") / 2,
            sum_squared_error(x.double(), t.double()),
        ),
        "probabilities": lambda: (
            cross_entropy_error(y, y), -(y * (y + 1e-7).log()).sum(),
            cross_entropy_error(y.double(), y.double()),
        ),
        "logits": lambda: (
            cross_entropy_error(x, index, from_logits=True, delta=0),
            F.cross_entropy(x, index, reduction="sum"),
            cross_entropy_error(x.double(), index, from_logits=True, delta=0),
        ),
    }[name]()  # fmt: skip
    ulp = torch.finfo(torch.float32).eps * exact.abs()
    assert (ours - exact).abs() <= torch.maximum((theirs - exact).abs(), ulp)
