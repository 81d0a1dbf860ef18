"""Random calls agree with the NumPy reference, for any shape, strides, dtypes, options and values.

Every run of the tests checks a few hundred calls. To check many:

    FUZZ_CASES=300000 python -m pytest -n 0 -m fuzz tests/test_fuzz.py

Each test of such a run checks 1000 calls, the same ones in every run of the same code. The memory
of the process grows by a few MB per test, because torch's compiler caches every compilation.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from calls import COMPILED, SECOND, TENSORS, Call, calls
from hypothesis import HealthCheck, Phase, given, settings
from numpy.typing import ArrayLike, NDArray
from samples import reference
from test_parity import UNITS
from torch import Tensor

from torchlosses import functional, ops

Arguments = dict[str, Any]

# `ops.KERNEL_LOADERS` for each implementation under test.
PATHS: dict[str, dict[str, Any]] = {"formula": {}, "kernels": ops.KERNEL_LOADERS}
CASES = int(os.environ.get("FUZZ_CASES", "100000"))
CHUNK = 1000
STEP = 1e-5  # Of finite differences in float64.

agreed: Counter[str] = Counter()


def check(call: Call) -> None:
    for path, kernels in PATHS.items():
        hypothesis.note(path)
        with (
            mock.patch.object(ops, "KERNEL_LOADERS", kernels),
            mock.patch.object(ops, "_prepared", {}),
            np.errstate(all="ignore"),
        ):
            check_transform(call, call.arguments())
    agreed[call.transform] += 1


class Expected:
    """Value and gradient by the reference, and the rounding errors that a result may have."""

    defined: Any = ...  # The part of the gradient that is documented, and compared.

    def __init__(self, call: Call, arguments: Arguments) -> None:
        self.loss, self.arguments = call.loss, arguments
        dtypes = arguments["input"].dtype, arguments["target"].dtype
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.eps = torch.finfo(self.dtype).eps
        self.value, self.grad = reference(call.loss, arguments)

    def check_value(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        assert value.shape == self.value.shape
        # Each log(y + δ) with y + δ near 1 has the absolute rounding error of y + δ.
        terms = 8 + self.arguments["input"].numel()
        close(value, self.value, 16 * self.eps, 4 * self.eps * terms * self.spread)

    def check_grad(self, grad: Tensor, upstream: ArrayLike = 1.0) -> None:
        assert grad.dtype == self.arguments["input"].dtype
        assert grad.shape == self.arguments["input"].shape
        if UNITS == 1 and (self.dtype, grad.dtype) == (torch.float64, torch.bfloat16):
            return  # Triton's interpreter truncates float64 to bfloat16 as if it were float32.
        expected = self.grad * np.asarray(upstream)
        rtol, atol = 16 * self.eps, 4 * self.eps
        # A subnormal target is rounded to a multiple of the smallest number, then divided by y + δ.
        atol += 4 * torch.finfo(self.dtype).tiny * self.eps / self.smallest_divisor
        if self.arguments.get("from_logits"):  # S − tⱼ/(pⱼ+δ) cancels.
            finite = np.abs(expected[np.isfinite(expected)])
            atol *= self.spread * (1 + finite.max(initial=0))
            rtol *= self.spread
        if grad.dtype != self.dtype:
            stored = torch.finfo(grad.dtype)
            # Rounded at the end; by kernels also before the product with the upstream gradient,
            # which is rounded itself if it is float64.
            roundings = (3 if self.dtype == torch.float64 else 2) if ops.KERNEL_LOADERS else 1
            rtol += roundings * UNITS * stored.eps
            atol += stored.smallest_normal * stored.eps
        is_odd = np.isfinite(grad.detach().double().numpy()) != np.isfinite(expected)
        if is_odd.any():
            is_odd &= self.overflows(grad.dtype)
            expected = np.where(is_odd, grad.detach().double(), expected)
        close(grad[self.defined], expected[self.defined], rtol, atol)

    def overflows(self, dtype: torch.dtype) -> NDArray[np.bool_]:
        """Where the gradient before weights and divisor may overflow.

        Kernels, and the reference in float64, apply weights and divisor last. Both weights are at
        most 2, so together at most 4. A gradient in float16 is computed in float32.
        """
        limit = torch.finfo(self.dtype if dtype == torch.float16 else dtype).max
        plain = {"reduction": "sum", "weight": None, "sample_weight": 1.0}
        plain = {name: value for name, value in plain.items() if name in self.arguments}
        slopes = np.abs(reference(self.loss, self.arguments | plain)[1])
        is_beyond: NDArray[np.bool_] = (slopes > limit / 4) & (self.arguments["input"] != 0).numpy()
        return is_beyond

    @property
    def smallest_divisor(self) -> float:
        """The smallest y + δ > 0, at most 1."""
        if "delta" not in self.arguments or self.arguments["from_logits"]:
            return 1
        guarded = self.arguments["input"].detach().double() + self.arguments["delta"]
        guarded = guarded[guarded > 0]
        return min(float(guarded.min()), 1) if guarded.numel() else 1

    @property
    def spread(self) -> float:
        """The factor by which e^z amplifies a relative error of z, up to where e^z underflows."""
        input = self.arguments["input"].detach().double()
        input = input[input.isfinite()]
        if not self.arguments.get("from_logits") or not input.numel():
            return 1
        return 1 + min(float(input.max() - input.min()), 100)


def close(actual: Tensor, expected: ArrayLike, rtol: float, atol: float) -> None:
    limit = torch.finfo(actual.dtype).max
    is_beyond = np.abs(expected) > limit
    expected = np.where(is_beyond, np.copysign(np.inf, expected), expected)
    torch.testing.assert_close(
        actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol, atol=atol, equal_nan=True,
    )  # fmt: skip


def check_transform(call: Call, arguments: Arguments) -> None:
    function = getattr(functional, call.loss)
    input = arguments["input"]

    def loss(y: Tensor) -> Tensor:
        result: Tensor = function(**arguments | {"input": y})
        return result

    if call.bad_position is not None and call.transform not in ("vmap", *COMPILED):
        with pytest.raises(IndexError):
            loss(input)
        return
    rng = np.random.default_rng(call.seed)
    if call.transform == "dependent":
        check_dependent(call, arguments, function, rng)
    elif call.transform in SECOND:
        check_second(call, arguments, function, rng)
    elif call.transform == "vmap":
        check_vmap(call, arguments, function, rng)
    elif call.transform == "changed":
        check_changed(call, arguments, loss, rng)
    else:
        check_first(call, arguments, loss, rng)


def check_first(
    call: Call, arguments: Arguments, loss: Callable[[Tensor], Tensor], rng: np.random.Generator
) -> None:
    input = arguments["input"]
    expected = expect(call, arguments)
    if call.transform == "no_grad":
        expected.check_value(loss(input))
    elif call.transform == "grad":
        grad: Any = torch.func.grad(lambda y: loss(y).sum())(input)
        expected.check_grad(grad)
    elif call.transform == "jvp":
        tangent = torch.tensor(rng.uniform(0.5, 2, input.shape), dtype=input.dtype)
        # torch writes the tangent in the strides of its tensor, which must not overlap.
        plain = input.contiguous() if call.layouts["input"] == "expanded" else input
        value, forward = torch.func.jvp(loss, (plain,), (tangent,))[:2]
        expected.check_value(value)
        products = expected.grad * tangent.double().numpy()
        # In a tangent 0·∞ is NaN.
        largest = 1 / expected.smallest_divisor
        if np.isfinite(products).all() and largest < torch.finfo(expected.dtype).max:
            rounding = 100 * expected.eps * expected.spread
            atol = rounding * (1 + np.abs(products).sum())
            close(forward.double().sum(), products.sum(), 0, atol)
    else:
        if call.transform in COMPILED:
            torch._dynamo.reset()
            loss = torch.compile(loss, fullgraph=True, dynamic=True, backend=call.transform)
        leaf = input.detach().requires_grad_()
        value = loss(leaf)
        expected.check_value(value)
        upstream = torch.tensor(rng.uniform(0.5, 2, value.shape), dtype=value.dtype)
        is_repeated = bool(rng.integers(2)) and call.transform not in COMPILED
        for retain_graph in (True, False) if is_repeated else (False,):
            (grad,) = torch.autograd.grad(value, leaf, upstream, retain_graph=retain_graph)
            expected.check_grad(grad, per_element(call, upstream))


def expect(call: Call, arguments: Arguments) -> Expected:
    """The reference; a row with an invalid class is NaN, for calls that cannot read values."""
    if call.bad_position is None:
        return Expected(call, arguments)
    target = arguments["target"].clone()
    target[call.bad_position] = 0
    expected = Expected(call, arguments | {"target": target})
    position = call.bad_position
    row: Any = (*position[: call.axis], slice(None), *position[call.axis :])
    is_none = arguments["reduction"] == "none"
    is_row = is_none and expected.value.shape == arguments["input"].shape
    expected.value = np.array(expected.value)
    expected.value[row if is_row else position if is_none else ...] = np.nan
    expected.grad[row] = np.nan
    if arguments["reduction"] == "mean":  # Whether an invalid class adds to the divisor is open.
        expected.defined = row
    return expected


def per_element(call: Call, upstream: Tensor) -> NDArray[Any]:
    """The upstream gradient in a shape that broadcasts to the input."""
    rank = np.ndim(call.arrays["input"])
    if call.arrays["reduction"] == "none" and upstream.dim() < rank:
        upstream = upstream.unsqueeze(call.axis)
    array: NDArray[Any] = upstream.double().numpy()
    return array


def check_vmap(
    call: Call, arguments: Arguments, function: Callable[..., Tensor], rng: np.random.Generator
) -> None:
    """Three calls at once, one with reversed inputs; the target is batched or not."""
    input, target = arguments["input"], arguments["target"]
    inputs = [input, input.flip(list(range(input.dim()))), input]
    in_dim = int(rng.integers(-1, input.dim() + 1))
    # A target that is not batched can be read, so an invalid class would be an error.
    is_shared = call.bad_position is None and bool(rng.integers(2))

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return function(**arguments | {"input": y, "target": t})

    def grad(y: Tensor, t: Tensor) -> Any:
        return torch.func.grad(lambda y: loss(y, t).sum())(y)

    dims = (in_dim, None if is_shared else 0)
    batch = torch.stack(inputs, in_dim), target if is_shared else torch.stack([target] * 3)
    values, grads = torch.vmap(loss, dims)(*batch), torch.vmap(grad, dims)(*batch)
    for y, value, grad_y in zip(inputs, values, grads, strict=True):
        expected = expect(call, arguments | {"input": y})
        expected.check_value(value)
        expected.check_grad(grad_y)


def check_second(
    call: Call, arguments: Arguments, function: Callable[..., Tensor], rng: np.random.Generator
) -> None:
    """Against finite differences of the reference in a random direction of all float arguments."""
    names = [name for name in call.dtypes if call.layouts[name] != "expanded"]
    if "input" not in names:
        return
    direction = {name: torch.tensor(rng.normal(size=arguments[name].shape)) for name in names}
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}

    def reference_at(step: float) -> tuple[NDArray[Any], NDArray[Any]]:
        moved = {name: arguments[name] + step * direction[name] for name in names}
        return reference(call.loss, arguments | moved)

    def directional(grads: tuple[Tensor | None, ...]) -> Tensor:
        """The directional derivative."""
        products = [
            (g * direction[n]).sum() for n, g in zip(names, grads, strict=True) if g is not None
        ]
        return torch.stack(products).sum()

    def grad(*values: Tensor) -> Any:
        by_name = dict(zip(names, values, strict=True))
        return torch.func.grad(lambda y: function(**arguments | by_name | {"input": y}).sum())(
            by_name["input"]
        )

    (value_after, grad_after), (value_before, grad_before) = map(reference_at, (STEP, -STEP))
    difference = (grad_after - grad_before) / (2 * STEP)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * (1 + np.abs(grad_after).sum())}
    tensors = tuple(leaves.values())
    value = function(**arguments | leaves)
    if call.transform == "vjp_of_arguments":
        upstream = torch.tensor(rng.uniform(0.5, 2, value.shape))
        grads = torch.autograd.grad(value, tensors, upstream)
        difference = (value_after - value_before) / (2 * STEP) * upstream.numpy()
        close(directional(grads), difference.sum(), **tolerance)
    elif call.transform == "jvp_of_grad":
        plain = tuple(leaf.detach() for leaf in tensors)
        tangent = torch.func.jvp(grad, plain, tuple(direction.values()))[1]
        close(tangent, difference, **tolerance)
    else:
        (grad_input,) = torch.autograd.grad(value.sum(), leaves["input"], create_graph=True)
        row = torch.tensor(rng.normal(size=grad_input.shape))
        seconds = torch.autograd.grad((grad_input * row).sum(), tensors, allow_unused=True)
        close(directional(seconds), (difference * row.numpy()).sum(), **tolerance)


def check_dependent(
    call: Call, arguments: Arguments, function: Callable[..., Tensor], rng: np.random.Generator
) -> None:
    """Target and input that depend on each other or on a leaf, against finite differences."""
    if call.arrays["target"].dtype != np.float64 or call.layouts["input"] == "expanded":
        return
    make = [lambda y: y * y, lambda y: y.flip(list(range(y.dim()))), torch.sigmoid][rng.integers(3)]
    direction = torch.tensor(rng.normal(size=arguments["input"].shape))

    def loss(y: Tensor) -> Tensor:
        return function(**arguments | {"input": y, "target": make(y)}).sum()

    def value(y: Tensor) -> float:
        return float(reference(call.loss, arguments | {"input": y, "target": make(y)})[0].sum())

    def grad(y: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf = y.detach().clone().requires_grad_()
        inner = leaf * 1 if rng.integers(2) else leaf
        return leaf, torch.autograd.grad(loss(inner), leaf, create_graph=create_graph)[0]

    input = arguments["input"]
    after, before = input + STEP * direction, input - STEP * direction
    _, first = grad(input)
    slope = (value(after) - value(before)) / (2 * STEP)
    scale = 1 + float(first.abs().sum())
    close((first * direction).sum(), slope, 1e-5, 1e-6 * scale)
    leaf, differentiable = grad(input, create_graph=True)
    close(differentiable, first.numpy(), 1e-9, 1e-11 * scale)
    row = torch.tensor(rng.normal(size=input.shape))
    product = (differentiable * row).sum()
    if product.requires_grad:
        (second,) = torch.autograd.grad(product, leaf)
        difference = (grad(after)[1] - grad(before)[1]) / (2 * STEP)
        scale += float(second.abs().sum())
        close((second * direction).sum(), (difference * row).sum().numpy(), 1e-5, 1e-6 * scale)


def check_changed(
    call: Call, arguments: Arguments, loss: Callable[[Tensor], Tensor], rng: np.random.Generator
) -> None:
    """An argument changes in place before backward: an error, or the gradient at its old value."""
    expected = expect(call, arguments)
    leaf = arguments["input"].detach().requires_grad_()
    input = leaf * 1
    value = loss(input)
    upstream = torch.tensor(rng.uniform(0.5, 2, value.shape), dtype=value.dtype)
    if rng.integers(2):
        torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    changed = [input, *(v for n, v in arguments.items() if n in TENSORS[1:] and v is not None)]
    changed = changed[rng.integers(len(changed))]
    if 0 in changed.stride() and changed.numel() > 1:  # torch refuses to write to it.
        return
    with torch.no_grad():
        changed.zero_()
    message = ""
    try:
        (grad,) = torch.autograd.grad(value, leaf, upstream, create_graph=bool(rng.integers(2)))
        expected.check_grad(grad, per_element(call, upstream))
    except RuntimeError as error:
        message = str(error)
    assert not message or "modified by an inplace operation" in message


def draw_and_check(cases: int, seed: int) -> None:
    run = given(calls())(check)
    run = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(run)
    hypothesis.seed(seed)(run)()


def test_a_few_hundred_calls() -> None:
    """Fewer in Triton's interpreter, where a launch takes several ms."""
    draw_and_check(60 if os.environ.get("TRITON_INTERPRET") == "1" else 400, CASES)


@pytest.fixture(scope="module")
def _summary(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.perf_counter()
    agreed.clear()
    yield
    seconds = time.perf_counter() - start
    counts = ", ".join(f"{count} {transform}" for transform, count in agreed.most_common())
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(
            f"\n{agreed.total()} of {CASES} calls agree with the reference, each by "
            f"{' and '.join(PATHS)}: {counts}; {seconds:.0f} s, seeds 0 to {CASES - 1} by {CHUNK}, "
            f"torch {torch.__version__}"
        )


@pytest.mark.fuzz
@pytest.mark.usefixtures("_summary")
@pytest.mark.parametrize("seed", range(0, CASES, CHUNK))
def test_many_calls(seed: int) -> None:
    draw_and_check(min(CHUNK, CASES - seed), seed)
