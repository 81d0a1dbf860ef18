"""The pass over the data is taken where it serves, and is the formula in other steps."""

import contextlib
import os
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torchlosses import checks, ops
from torchlosses.formulas import Arguments, Call
from torchlosses.functional import cross_entropy_error, sum_squared_error
from torchlosses.kernels import cpu

SHAPE = (256, 128)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, tuple[bool, bool]]]]:
    """The kinds of loss that kernels make meanwhile, and which gradients are asked for."""
    called = []
    kernel = cpu.Plan.compute

    def compute(plan: Any, *arguments: Any) -> Any:
        called.append((plan.call.kind, arguments[4]))
        return kernel(plan, *arguments)

    with mock.patch.object(cpu.Plan, "compute", compute):
        yield called


def test_every_kernel_serves() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    soft, index = torch.rand(SHAPE), torch.randint(SHAPE[1], SHAPE[:1])
    weights: dict[str, Any] = {
        "weight": torch.rand(SHAPE[1]),
        "sample_weight": torch.rand(SHAPE[0]),
    }
    with counted() as called:
        for target in (soft, index, soft.T.contiguous().T, soft > 0.5):
            sum_squared_error(y, target)
            cross_entropy_error(y, target, **weights)
            cross_entropy_error(y[:, :-1], target[..., : None if target is index else -1] % 127)
            cross_entropy_error(y, target, from_logits=True, label_smoothing=0.1)
    assert [kind for kind, _ in called] == ["squares", *["probabilities"] * 2, "logits"] * 4


@pytest.mark.parametrize(
    "shape",
    [(3, 7), (5, 33), (2, 1031), (2, 40_001), (2, 5, 19), (2, 40, 19), (2, 600, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("is_index", [False, True])
def test_a_gradient_written_over_its_input(
    shape: tuple[int, ...], dtype: torch.dtype, is_index: bool
) -> None:
    target = torch.randint(shape[1], (shape[0], *shape[2:])) if is_index else torch.rand(shape)
    for delta in (0, 1e-7):
        for smoothing in (0, 0.1):
            made = call(is_index=is_index, delta=delta)._replace(label_smoothing=smoothing)
            made = made._replace(dtype=torch.promote_types(dtype, torch.float32))
            x = torch.randn(shape).to(dtype)
            plan = cpu.prepare(made, x, target, None, None)
            result = plan.compute(x, target, None, None, (True, False))
            over = plan.compute(x, target, None, None, (True, False), None, True)
            assert over[1] is x
            torch.testing.assert_close(over[:2], result[:2], rtol=0, atol=0)


def call(kind: str = "logits", *, is_index: bool = False, delta: float = 1e-7) -> Call:
    return Call(kind, is_index, 1, "sum", -100, torch.float32, delta)


def test_the_formula_serves_the_rest() -> None:
    y, target = torch.rand(SHAPE), torch.rand(SHAPE)

    def is_served(call: Call, *tensors: Tensor) -> bool:
        arguments = Arguments(*tensors)
        key = ops.key_of(call.kind, call, arguments)
        return ops.prepare(key, call, arguments) is not None

    assert is_served(call(), y, target)
    weight = torch.rand(SHAPE[1])
    assert is_served(call(), y, target, weight)
    assert not is_served(call(), y, target, weight.requires_grad_())
    assert not is_served(call(), y[:0], target[:0])
    assert not is_served(call(), y.to(torch.float8_e5m2), target)
    assert is_served(call(), y.T, target.T)
    assert not is_served(call(), y[:1].expand(SHAPE), target)
    assert not is_served(call(), torch._neg_view(y), target)
    for delta in (1e-40, 1e39):
        assert not is_served(call(delta=delta), y, target)
    assert not is_served(call(), y.as_subclass(type("Mine", (Tensor,), {})), target)
    assert not is_served(call(), y.to("meta"), target.to("meta"))
    with forward_ad.dual_level():
        assert not is_served(call(), y, target)
    served = []

    def ask(y: Tensor) -> Tensor:
        served.append(is_served(call(), y, target))
        return y.sum()

    torch.vmap(ask)(y[None])
    torch.func.grad(ask)(y)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        ask(y)
    torch.fx.experimental.proxy_tensor.make_fx(ask)(y)
    assert served == [False] * 4


def test_without_the_extension_the_formula_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchlosses.kernels.cpu", None)
    monkeypatch.delattr("torchlosses.kernels.cpu")
    monkeypatch.setattr(ops, "_prepared", {})
    ops._load_cpu.cache_clear()
    y = torch.rand(4, 5)
    with pytest.warns(UserWarning, match="no compiled CPU kernels"):
        loss = sum_squared_error(y, torch.zeros_like(y))
    torch.testing.assert_close(loss, y.square().sum() / 2)
    sum_squared_error(y, y)
    ops._load_cpu.cache_clear()


class Slow:
    """Finds modules so slowly that the handler of a signal has enough of it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchlosses.kernels.cpu":
            raise TimeoutError("enough")


def test_a_signal_in_the_first_call_says_nothing_of_the_extension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torchlosses.kernels.cpu")
    monkeypatch.delattr("torchlosses.kernels.cpu")
    monkeypatch.setattr(ops, "_prepared", {})
    ops._load_cpu.cache_clear()
    y = torch.rand(4, 5)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
        with pytest.raises(TimeoutError, match="enough"):
            sum_squared_error(y, y)
    assert ops._load_cpu() is sys.modules["torchlosses.kernels.cpu"]
    ops._load_cpu.cache_clear()


def test_a_signal_in_a_kernel_says_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CAN_FAIL", True)
    monkeypatch.setattr(cpu.Plan, "compute", mock.Mock(side_effect=TimeoutError("enough")))
    with pytest.raises(TimeoutError, match="enough"):
        sum_squared_error(torch.rand(4, 5), torch.rand(4, 5))
    assert not ops._failed


def test_detectors_are_there() -> None:
    """Private to torch; without one every call would go to the formula, and nobody would know."""
    assert checks.are_transforms_active is not checks.assume_yes
    assert checks.count_modes is not checks.assume_yes
    assert checks.is_jit_tracing is not checks.assume_yes
    assert checks.is_pre_dispatch_tracing is not checks.assume_yes
    assert hasattr(torch.compiler, "_is_exporting_flag")
    assert checks.find_saving_hooks is not checks.assume_yes
    assert ops._ONE_PASS_NODE is type(
        sum_squared_error(torch.rand(3, requires_grad=True), torch.rand(3)).grad_fn
    )
    assert None not in checks._INFRA_MODES
    assert torch._C._get_dispatch_mode(checks._INFRA_MODES[0]) is None
    assert forward_ad._current_level == -1


FORMS: list[tuple[Any, dict[str, Any]]] = [
    (sum_squared_error, {}),
    (cross_entropy_error, {}),
    (cross_entropy_error, {"from_logits": True}),
    (cross_entropy_error, {"from_logits": True, "delta": 0}),
    (cross_entropy_error, {"from_logits": True, "label_smoothing": 0.1}),
]
# Around the segments that the kernels work on, and the widths of vectors.
SIZES: list[tuple[int, ...]] = [(1, n + d) for n in (2**10, 2**12, 2**19) for d in (-1, 0, 1)]
SIZES += [(2**16 - 1, 8), (2**16 + 1, 8), (3, 257, 1031), (70_001, 11), (5, 3, 2**14 + 1)]
SIZES += [(3, n) for n in (*range(1, 20), 31, 33, 63, 65, 127, 129)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_index", [False, True])
def test_sizes_around_a_segment(shape: tuple[int, ...], dtype: torch.dtype, is_index: bool) -> None:
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
    with counted() as called:
        sum_squared_error(y, target)
        sum_squared_error(y.requires_grad_(), target)
        sum_squared_error(y, target.requires_grad_())
        with torch.no_grad():
            sum_squared_error(y, target)
        sum_squared_error(y, target, reduction="none")
    asked = [(False, False), (True, False), (True, True), (False, False), (False, False)]
    assert [needs for _, needs in called] == asked


def test_saved_tensor_hooks_see_all_that_is_held() -> None:
    y, target = torch.rand(SHAPE, requires_grad=True), torch.rand(SHAPE)
    weight, sample_weight = torch.rand(SHAPE[1]), torch.rand(SHAPE[0])
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy_error(y, target, weight=weight, sample_weight=sample_weight)
    assert [t.shape for t in packed] == [SHAPE, SHAPE, SHAPE[1:], SHAPE[:1]]
    (grad,) = torch.autograd.grad(loss, y, torch.tensor(3.0))
    plain = cross_entropy_error(y, target, weight=weight, sample_weight=sample_weight)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, y, torch.tensor(3.0))[0])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_kept_holds_nothing(reduction: Any) -> None:
    y, history, alive = torch.rand(SHAPE, requires_grad=True), [], []
    for _ in range(3):
        target, weight = torch.rand(SHAPE), torch.rand(SHAPE[1])
        alive += [weakref.ref(target), weakref.ref(weight)]
        history.append(cross_entropy_error(y, target, weight=weight, reduction=reduction))
        history[-1].sum().backward()
    del target, weight
    assert [reference() for reference in alive] == [None] * 6


def test_what_is_handed_over_may_be_written_to() -> None:
    """The caller's gradient is no longer that of the graph."""
    y = torch.rand(SHAPE, requires_grad=True)
    loss = cross_entropy_error(y, torch.rand(SHAPE))
    (grad,) = torch.autograd.grad(loss, y, retain_graph=True)
    expected = grad.clone()
    grad.zero_()
    assert torch.equal(torch.autograd.grad(loss, y)[0], expected)


def test_checkpoint_under_a_mode_in_forward_alone() -> None:
    y, target = torch.rand(SHAPE, requires_grad=True), torch.randint(SHAPE[1], SHAPE[:1])

    def f(y: Tensor) -> Tensor:
        return cross_entropy_error(y * 1, target, from_logits=True)

    with FlopCounterMode(display=False):
        loss = checkpoint(f, y, use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(y.grad, torch.autograd.grad(f(y), y)[0])


def test_backward_again_gives_the_same_bits() -> None:
    for dtype in ops.DTYPES:
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
def test_a_loss_scaler_lifts_what_float16_cannot_hold(form: str, reduction: Any) -> None:
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
    torch.autograd.grad(loss, y, retain_graph=True)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_without_asking_is_an_error() -> None:
    y = torch.rand(SHAPE, requires_grad=True)
    loss = sum_squared_error(y, torch.rand(SHAPE))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the advice is Linux's")
def test_fresh_memory_is_advised_within_its_bounds() -> None:
    """Of a gradient all huge pages that lie in it are, and no byte beyond it."""

    def is_advised(address: int) -> bool:
        is_within = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                is_within = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif is_within and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError(address)

    page, fresh = 2**21, 2**25
    for size in (fresh, fresh + 4, fresh + page // 2):
        y = torch.zeros(size // 4, requires_grad=True)
        (tensor,) = torch.autograd.grad(sum_squared_error(y, y.detach()), y)
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-start // page) * page, end // page * page
        assert is_advised(first)
        assert is_advised(last - 1)
        assert first == start or not is_advised(start)
        assert last == end or not is_advised(end - 1)
    small = cpu.empty(torch.empty(fresh // 4 - 1))
    assert not is_advised(small.data_ptr() + small.nbytes // 2)


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


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_where_a_kernel_fails_the_formula_serves_and_says_so_once(
    fails_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss per sample is made in forward, and its gradient in backward."""
    y = torch.rand(SHAPE, requires_grad=True)
    index = torch.randint(SHAPE[1], SHAPE[:1])
    expected = cross_entropy_error(y, index, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), y)

    compute = cpu.Plan.compute

    def failing(*arguments: Any) -> Any:
        needs = arguments[5]
        called.append(needs)
        if needs[0] == (fails_in == "backward"):
            raise RuntimeError("out of resource: shared memory")
        return compute(*arguments)

    called: list[Any] = []
    monkeypatch.setattr(cpu, "CAN_FAIL", True)
    monkeypatch.setattr(cpu.Plan, "compute", failing)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        value = cross_entropy_error(y, index, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), y)
        cross_entropy_error(y, index)
    assert len(warned) == 1
    assert "RuntimeError: out of resource" in str(warned[0].message)
    torch.testing.assert_close((value, grad), (expected, expected_grad))
    called.clear()
    cross_entropy_error(y, index, reduction="none")  # Though such a call was known.
    assert ops.kernels_of(y.device, "probabilities") is None
    assert not called
    monkeypatch.setattr(ops, "_failed", set())
    monkeypatch.setattr(cpu.Plan, "compute", compute)
    no_rescale = mock.Mock(side_effect=RuntimeError("no such function"))
    monkeypatch.setattr(cpu.Plan, "rescale", no_rescale)
    value = cross_entropy_error(y, index)
    with pytest.warns(UserWarning, match="a kernel failed on cpu"):
        (grad,) = torch.autograd.grad(value, y)
    torch.testing.assert_close(grad, expected_grad)
    with pytest.raises(IndexError):
        cross_entropy_error(y, index + SHAPE[1])
