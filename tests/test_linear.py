"""The linear loss agrees with the layer followed by the loss, in less memory."""

import contextlib
import copy
import io
import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import calls
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import LINEAR_CROSS_ENTROPIES, REDUCTIONS, Sample, reference
from test_parity import TOLERANCES
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torchlosses import LinearCrossEntropyError, checks, linear, ops
from torchlosses.formulas import Call
from torchlosses.functional import cross_entropy_error, linear_cross_entropy_error

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "100000"))
NAMES = ("input", "linear_weight", "linear_bias", "target", "weight", "sample_weight")
ALL = [s for s in LINEAR_CROSS_ENTROPIES if "-(7, 4)-all" in s.name]
named = pytest.mark.parametrize("sample", LINEAR_CROSS_ENTROPIES, ids=lambda sample: sample.name)
forms = pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.name)


CHUNK = linear.CHUNK_BYTES_PER_CLASS


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Chunks of at most two rows in float64, four in float32."""
    with (
        mock.patch.object(linear, "CHUNK_BYTES_PER_CLASS", 16),
        mock.patch.object(linear, "BLOCK", 2),
    ):
        yield


def tensors(sample: Sample, dtype: torch.dtype, device: str) -> dict[str, Any]:
    input, target, options = sample.tensors(dtype, device)
    return {"input": input, "target": target} | options


def layer_and_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The definition of the linear loss."""
    logits = F.linear(input, linear_weight, linear_bias)
    return cross_entropy_error(logits, target, from_logits=True, dim=-1, **options)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def require_grad(arguments: dict[str, Any], *names: str) -> tuple[Tensor, ...]:
    """The floating-point tensors, or those with these names; from now on they require gradients."""
    return tuple(
        value.requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and name in (names or NAMES)
    )  # fmt: skip


# ---- Values and gradients


def assert_matches_reference(sample: Sample, dtype: torch.dtype, device: str) -> None:
    arguments = tensors(sample, dtype, device)
    leaves = require_grad(arguments, "input", "linear_weight", "linear_bias")
    value = linear_cross_entropy_error(**arguments)
    grads = torch.autograd.grad(value.sum(), leaves)
    expected_value, expected_grads = reference(sample.loss, arguments)
    expected = dict(zip(("input", "linear_weight", "linear_bias"), expected_grads, strict=True))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (rtol, atol), (grad_rtol, grad_atol) = TOLERANCES[dtype]
    if dtype.itemsize == 2:  # Logits, their gradients and sums over them are rounded.
        rtol = atol = grad_rtol = grad_atol = 16 * torch.finfo(dtype).eps
    rtol, atol, grad_rtol, grad_atol = 8 * rtol, 8 * atol, 8 * grad_rtol, 8 * grad_atol
    torch.testing.assert_close(
        value.detach().double().cpu(), torch.tensor(expected_value), rtol=rtol, atol=atol
    )
    for name, actual in zip([n for n in expected if n in arguments], grads, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double().cpu(), torch.tensor(expected[name]), rtol=grad_rtol, atol=grad_atol
        )


@named
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_matches_the_reference(sample: Sample, dtype: torch.dtype, device: str) -> None:
    assert_matches_reference(sample, dtype, device)


@named
def test_gradients_by_all_arguments_any_number_of_times(sample: Sample, device: str) -> None:
    arguments = tensors(sample, torch.float64, device)
    for names in (NAMES[:4], NAMES):  # Kernels serve calls without gradients by the weights.
        leaves = require_grad(arguments, *names)
        loss, expected = linear_cross_entropy_error(**arguments), layer_and_loss(**arguments)
        upstream = torch.randn_like(loss)
        expected_grads = torch.autograd.grad(expected, leaves, upstream)
        for _ in range(3):
            close(torch.autograd.grad(loss, leaves, upstream, retain_graph=True), expected_grads)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_arguments_that_require_grad_have_gradients(
    needed: tuple[bool, ...], reduction: Any, device: str
) -> None:
    for sample in ALL:
        arguments = tensors(sample, torch.float64, device) | {"reduction": reduction}
        names = [name for name, n in zip(NAMES, needed, strict=False) if n]
        leaves = require_grad(arguments, *names) if names else ()
        loss = linear_cross_entropy_error(**arguments)
        assert loss.requires_grad == any(needed)
        close(loss, layer_and_loss(**arguments))
        if leaves:
            expected = torch.autograd.grad(layer_and_loss(**arguments).sum(), leaves)
            close(torch.autograd.grad(loss.sum(), leaves), expected)


def test_float64_target_promotes_the_loss(device: str) -> None:
    x, w = torch.randn(5, 4, device=device), torch.randn(3, 4, device=device)
    t = torch.rand(5, 3, dtype=torch.float64, device=device).softmax(1).requires_grad_()
    loss = linear_cross_entropy_error(x.requires_grad_(), w, t)
    assert loss.dtype == torch.float64
    by_x, by_t = torch.autograd.grad(loss, (x, t))
    expected = torch.autograd.grad(layer_and_loss(x, w, t), (x, t))
    assert (by_x.dtype, by_t.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close((by_x, by_t), expected)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint16", "uint64", "onehot", "bool"])
def test_targets_of_any_dtype(kind: str, device: str) -> None:
    x = torch.randn(5, 4, device=device, requires_grad=True)
    w = torch.randn(3, 4, device=device, requires_grad=True)
    t = torch.randint(3, (5,), device=device)
    other = t.to(getattr(torch, kind)) if "int" in kind else F.one_hot(t, 3)
    other = other.bool() if kind == "bool" else other
    losses = [linear_cross_entropy_error(x, w, target) for target in (other, t)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, w)) for loss in losses))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_be_infinite_or_nan(reduction: Any, device: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    t = torch.tensor([1, -100, 0, 2, -100, 1], device=device)
    w = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    expected = linear_cross_entropy_error(x.requires_grad_(), w, t, reduction=reduction)
    expected_grads = torch.autograd.grad(expected.sum(), (x, w))
    odd = x.detach().clone()
    odd[1], odd[4] = torch.inf, torch.nan
    odd.requires_grad_()
    loss = linear_cross_entropy_error(odd, w, t, reduction=reduction)
    close(loss, expected)
    close(torch.autograd.grad(loss.sum(), (odd, w)), expected_grads)
    weight = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    loss = linear_cross_entropy_error(odd, w, t, reduction=reduction, weight=weight)
    close(torch.autograd.grad(loss.sum(), (odd, w)), expected_grads)
    all_ignored = torch.full_like(t, -100)
    loss = linear_cross_entropy_error(odd, w, all_ignored, reduction=reduction)
    assert loss.abs().sum() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss.sum(), (odd, w)))


def test_ignored_rows_are_zeroed_where_labels_cannot_be_read(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU reading the labels would synchronize; on a CPU ignored rows are left out."""
    for sample in ALL:
        arguments = tensors(sample, torch.float64, device)
        if not sample.is_index:
            continue
        leaves = require_grad(arguments, *NAMES[:4])
        expected = linear_cross_entropy_error(**arguments)
        expected_grads = torch.autograd.grad(expected.sum(), leaves)
        with monkeypatch.context() as patch:
            patch.setattr(checks, "can_read_values", lambda tensor: False)
            loss = linear_cross_entropy_error(**arguments)
            close(loss, expected)
            close(torch.autograd.grad(loss.sum(), leaves), expected_grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)], ids=str)
def test_no_rows_no_features_or_no_classes(
    sizes: tuple[int, int, int], reduction: Any, device: str
) -> None:
    n, d, v = sizes
    x = torch.randn(n, d, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(v, d, dtype=torch.float64, device=device, requires_grad=True)
    targets = [torch.rand(n, v, dtype=torch.float64, device=device)]
    if v:
        targets.append(torch.randint(v, (n,), device=device))
    for t in targets:
        loss, expected = (
            f(x, w, t, reduction=reduction) for f in (linear_cross_entropy_error, layer_and_loss)
        )
        close(loss, expected)
        grads, expected_grads = (
            torch.autograd.grad(value.sum(), (x, w)) for value in (loss, expected)
        )
        close(grads, expected_grads)


def test_any_strides(device: str) -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=device).transpose(0, 2)
    w = torch.randn(4, 7, dtype=torch.float64, device=device).T[:, :4]
    t = torch.randint(7, (6, 5), device=device).T
    b = torch.randn(7, 2, dtype=torch.float64, device=device)[:, 1]
    scale = torch.rand(6, dtype=torch.float64, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w, b)]
    losses = [
        f(leaves[0], leaves[1], t, linear_bias=leaves[2], sample_weight=scale, reduction="mean")
        for f in (linear_cross_entropy_error, layer_and_loss)
    ]
    close(*losses)
    close(*(torch.autograd.grad(loss, leaves) for loss in losses))
    expanded = x[:1, :1].expand(5, 6, 4)
    close(linear_cross_entropy_error(expanded, w, t), layer_and_loss(expanded, w, t))
    close(linear_cross_entropy_error(x.mT.mT, w, t), layer_and_loss(x, w, t))


def test_a_delta_outside_the_range_of_float32(device: str) -> None:
    x = torch.randn(5, 4, device=device, requires_grad=True)
    w, t = torch.randn(3, 4, device=device), torch.randint(3, (5,), device=device)
    loss, expected = (f(x, w, t, delta=1e-40) for f in (linear_cross_entropy_error, layer_and_loss))
    torch.testing.assert_close(loss, expected)


def test_results_are_deterministic(device: str) -> None:
    x = torch.randn(9, 4, device=device, requires_grad=True)
    w = torch.randn(7, 4, device=device, requires_grad=True)
    t = torch.randint(7, (9,), device=device)
    results = []
    for _ in range(2):
        loss = linear_cross_entropy_error(x, w, t, reduction="mean")
        first = torch.autograd.grad(loss, (x, w), torch.full_like(loss, 1.7), retain_graph=True)
        results += [(loss, *first), (loss, *torch.autograd.grad(loss, (x, w), loss * 0 + 1.7))]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- Half precision


def test_half_precision_accumulates_in_float32(device: str) -> None:
    """The weight's gradient, summed over many chunks, is within a few roundings of float64."""
    for dtype in (torch.bfloat16, torch.float16):
        x, w = torch.rand(8192, 16, device=device), torch.randn(8, 16, device=device)
        x, w = x.to(dtype), w.to(dtype).requires_grad_()
        t = torch.zeros(8192, dtype=torch.int64, device=device)
        leaf = w.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(layer_and_loss(x.double(), leaf, t), leaf)
        for weight in (None, torch.ones(8, device=device, requires_grad=True)):
            with mock.patch.object(linear, "CHUNK_BYTES_PER_CLASS", 2**7):
                loss = linear_cross_entropy_error(x, w, t, weight=weight)
                (ours,) = torch.autograd.grad(loss, w)
            assert (ours - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_scaling_in_half_precision(reduction: Any, device: str) -> None:
    """The scale is part of the upstream gradient, by which the mean's divisor is multiplied."""
    x, w = torch.rand(5, 4, device=device).half(), torch.randn(3, 4, device=device).half()
    t = torch.tensor([0, 2, -100, 1, 2], device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, w)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    ours = linear_cross_entropy_error(leaves[0], leaves[1], t, reduction=reduction).sum()
    theirs = layer_and_loss(exact[0], exact[1], t, reduction=reduction).sum()
    grads = torch.autograd.grad(ours * 64, leaves)
    for actual, expected in zip(grads, torch.autograd.grad(theirs * 64, exact), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-6)


def test_a_sum_beyond_the_range_of_float16(device: str) -> None:
    x = torch.zeros(50, 4, dtype=torch.float16, device=device, requires_grad=True)
    w, t = torch.zeros_like(x[:3]), torch.zeros(50, dtype=torch.int64, device=device)
    loss = linear_cross_entropy_error(x, w, t, delta=0, sample_weight=torch.full_like(t, 2000))
    torch.testing.assert_close(loss, torch.full_like(loss, 1e5 * np.log(3)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_scaling_prevents_underflow_in_float16(reduction: Any, device: str) -> None:
    x = torch.rand(4, 8, device=device).half().requires_grad_()
    w = torch.rand(5, 8, device=device).half().requires_grad_()
    t = torch.randint(5, (4,), device=device)
    weights = torch.full((4,), 1e-8, device=device)
    loss = linear_cross_entropy_error(x, w, t, reduction=reduction, sample_weight=weights)
    factor = 2.0**24
    grads = torch.autograd.grad(loss.sum() * factor, (x, w))
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, w)]
    exact = torch.autograd.grad(
        layer_and_loss(leaves[0], leaves[1], t, sample_weight=weights).sum() * factor, leaves
    )
    for ours, expected in zip(grads, exact, strict=True):
        assert (expected / factor).abs().max() < 2**-25
        torch.testing.assert_close(ours.double(), expected, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_agrees_with_the_layer_and_loss(
    dtype: torch.dtype, bias: bool, device: str
) -> None:
    x = torch.randn(5, 8, device=device, requires_grad=True)
    w, b = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((3, 8), (3,)))
    t = torch.tensor([0, 2, -100, 1, 0], device=device)
    leaves = (x, w, b) if bias else (x, w)
    options: dict[str, Any] = {"linear_bias": b} if bias else {}
    with torch.autocast(device, dtype=dtype):
        loss, expected = (
            f(x, w, t, **options) for f in (linear_cross_entropy_error, layer_and_loss)
        )
        mixed = linear_cross_entropy_error(x.to(dtype), w, t, **options)
        with pytest.raises(TypeError, match="linear_weight"):
            linear_cross_entropy_error(x.double(), w, t)
    assert loss.dtype == torch.float32
    rounded: dict[str, Any] = {"rtol": 2e-2, "atol": 4e-2}
    torch.testing.assert_close(loss, expected, **rounded)
    torch.testing.assert_close(mixed, expected, **rounded)
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(g.dtype == torch.float32 for g in grads)
    expected_grads = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(grads, expected_grads, **rounded)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(again, expected_grads, **rounded)


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            self.dtypes |= {tensor.dtype for tensor in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_autocast_multiplies_in_float32_where_half_precision_is_slow(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_fast_matmul", lambda device, dtype: False)
    x, w, b = (
        torch.randn(*shape, device=device, requires_grad=True) for shape in ((5, 8), (3, 8), (3,))
    )
    t = torch.tensor([0, 2, -100, 1, 0], device=device)
    with MatmulDtypes() as products, torch.autocast(device, dtype=torch.bfloat16):
        for reduction in ("mean", "none"):
            loss = linear_cross_entropy_error(x, w, t, linear_bias=b, reduction=reduction)
            torch.autograd.grad(loss.sum(), (x, w, b))
    assert products.dtypes == {torch.float32}


def test_bfloat16_products_count_as_slow_if_torch_lacks_the_detector() -> None:
    """torch's detector of fast bfloat16 products is private."""
    cpu = torch.device("cpu")
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (False, True)
    with mock.patch.object(torch.ops, "mkldnn", None):
        assert not linear.has_fast_matmul(cpu, torch.bfloat16)


# ---- Derivatives


@pytest.mark.parametrize("sample", [s for s in LINEAR_CROSS_ENTROPIES if "-(7, 4)-all" in s.name
                                    or "-(4,)-plain" in s.name], ids=lambda s: s.name)  # fmt: skip
def test_gradcheck(sample: Sample, device: str, path: str) -> None:
    arguments = tensors(sample, torch.float64, device)
    leaves = require_grad(arguments)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]

    def loss(*values: Tensor) -> Tensor:
        return linear_cross_entropy_error(**arguments | dict(zip(names, values, strict=True)))

    assert gradcheck(loss, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    if path == "kernels":
        assert gradgradcheck(loss, leaves, check_fwd_over_rev=True, fast_mode=True)


@forms
def test_transforms(sample: Sample, device: str) -> None:
    """Transforms for which torch's own linear loss raises an error or returns wrong numbers."""
    arguments = tensors(sample, torch.float64, device)
    x, w = arguments.pop("input"), arguments.pop("linear_weight")

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy_error(x, w, **arguments).sum()

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return layer_and_loss(x, w, **arguments).sum()

    ones = (torch.ones_like(x), torch.ones_like(w))
    for transform in (
        lambda f: jvp(f, (x, w), ones),
        lambda f: grad(f, (0, 1))(x, w),
        lambda f: vmap(f, (None, 0))(x, torch.stack((w, 2 * w))),
        lambda f: vmap(grad(f), (None, 0))(x, torch.stack((w, 2 * w))),
        lambda f: jacrev(f)(x, w),
        lambda f: hessian(f)(x, w),
    ):
        close(transform(ours), transform(theirs))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, ones[0]), forward_ad.make_dual(w, ones[1])
        tangents = [forward_ad.unpack_dual(f(*dual)).tangent for f in (ours, theirs)]
    close(*tangents)
    assert tangents[0].abs() > 0


def test_vmap_over_a_bad_class_is_nan(device: str) -> None:
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    t = torch.tensor([0, 5, 1], device=device)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy_error(x, w, t)

    assert vmap(loss)(x, t).isnan().tolist() == [False, True, False]


@forms
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(sample: Sample, use_reentrant: bool, device: str) -> None:
    arguments = tensors(sample, torch.float64, device)
    x = arguments.pop("input").requires_grad_()
    for name in ("linear_weight", "weight"):  # The second checkpoints its chunks itself.
        require_grad(arguments, name)

        def f(x: Tensor) -> Tensor:
            return linear_cross_entropy_error(x, **arguments).sum()

        x.grad = None
        checkpoint(f, x, use_reentrant=use_reentrant).backward()
        close(x.grad, torch.autograd.grad(f(x), x)[0])
        with FlopCounterMode(display=False):
            loss = checkpoint(f, x, use_reentrant=False)
        close(torch.autograd.grad(loss, x)[0], x.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("is_index", [False, True])
def test_arguments_computed_from_one_leaf(is_index: bool, reduction: Any, device: str) -> None:
    """First derivatives and a gradient penalty."""
    leaf = torch.rand(6, 6, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.arange(6, device=device)
    results = []
    for loss in (linear_cross_entropy_error, layer_and_loss):
        x = leaf * 1.5
        t = index if is_index else x.square()
        named = {"linear_bias": x.sum(0), "reduction": reduction, "sample_weight": index * 0.5}
        value = loss(x, x.sin().T, t, **named).sum() * 3
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (graph,) = torch.autograd.grad(value, leaf, create_graph=True)
        (second,) = torch.autograd.grad(graph.square().sum(), leaf, retain_graph=True)
        (again,) = torch.autograd.grad(value, leaf)
        results.append((value, first, graph, second, again))
    close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_index", [False, True])
def test_argument_that_changes_before_backward_is_an_error_or_has_no_effect(
    reduction: Any, dtype: torch.dtype, is_index: bool, device: str
) -> None:
    """For each argument, and for first, repeated and differentiable backward passes."""

    def make_arguments() -> dict[str, Any]:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {
            name: torch.rand(*shape, device=device).to(dtype)
            for name, shape in (("input", (5, 4)), ("linear_weight", (3, 4)), ("linear_bias", (3,)),
                                ("weight", (3,)), ("sample_weight", (5,)))
        }  # fmt: skip
        arguments["target"] = torch.rand(5, 3, device=device).to(dtype)
        if is_index:
            arguments["target"] = torch.tensor([0, 1, -100, 2, 1], device=device)
        return arguments

    for name, use in itertools.product(NAMES, ("once", "again", "create_graph")):
        arguments = make_arguments()
        leaf = arguments["input"].clone().requires_grad_()
        arguments["input"] = leaf * 1
        value = linear_cross_entropy_error(**arguments, reduction=reduction).sum() * 3
        (expected,) = torch.autograd.grad(value, leaf, retain_graph=True)
        if use != "again":
            value = linear_cross_entropy_error(**arguments, reduction=reduction).sum() * 3
        with torch.no_grad():
            arguments[name].zero_()
        with contextlib.suppress(RuntimeError):
            (found,) = torch.autograd.grad(value, leaf, create_graph=use == "create_graph")
            torch.testing.assert_close(found, expected, msg=f"{name}, {use}")


def test_batched_upstream_gradients(device: str) -> None:
    x = torch.randn(6, 4, device=device, requires_grad=True)
    w, t = torch.randn(5, 4, device=device), torch.randint(5, (6,), device=device)
    losses = linear_cross_entropy_error(x, w, t, reduction="none")
    rows = torch.eye(6, device=device)[:3]
    (batched,) = torch.autograd.grad(losses, x, rows, is_grads_batched=True, retain_graph=True)
    for row, found in zip(rows, batched, strict=True):
        (expected,) = torch.autograd.grad(losses, x, row, retain_graph=True)
        torch.testing.assert_close(found, expected)


# ---- The compiler


COMPILED = [
    sample
    for sample in LINEAR_CROSS_ENTROPIES
    if re.search(r"-\(7, 4\)-all-(mean|none)|soft-\(7, 4\)-bias-mean", sample.name)
]
once = pytest.mark.parametrize("path", ["kernels"], indirect=True)


@once
@pytest.mark.parametrize("sample", COMPILED, ids=lambda sample: sample.name)
def test_compile(sample: Sample, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        linear_cross_entropy_error, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    has_learned_weights = "soft" in sample.name
    stances: list[tuple[Any, int]] = [("default", 1), ("fail_on_recompile", 2)]
    for stance, repeats in stances:
        arguments = tensors(sample, torch.float64, device)
        for name in ("input", "target", "sample_weight"):
            if name in arguments:
                arguments[name] = torch.cat([arguments[name]] * repeats)
        leaves = require_grad(arguments, *(NAMES if has_learned_weights else NAMES[:4]))
        with torch.compiler.set_stance(stance):
            loss, expected = compiled(**arguments), layer_and_loss(**arguments)
            close(loss, expected)
            upstream = torch.rand_like(loss)
            close(*(torch.autograd.grad(f, leaves, upstream) for f in (loss, expected)))


@once
def test_compile_by_inductor(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy_error, fullgraph=True)
    sample = COMPILED[0]
    arguments = tensors(sample, torch.float32, device)
    leaves = require_grad(arguments, *NAMES[:4])
    losses = compiled(**arguments), layer_and_loss(**arguments)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


@once
def test_compiled_transforms_and_bad_classes(device: str) -> None:
    x, w = torch.randn(5, 4, device=device), torch.randn(3, 4, device=device)
    t = torch.tensor([0, 1, -100, 2, 1], device=device)

    def dual(x: Tensor) -> Any:
        with forward_ad.dual_level():
            loss = linear_cross_entropy_error(forward_ad.make_dual(x, x), w, t)
            return forward_ad.unpack_dual(loss).tangent

    for f in (
        lambda x: jvp(lambda x: linear_cross_entropy_error(x, w, t), (x,), (x,)),
        lambda x: grad(lambda x: linear_cross_entropy_error(x, w, t))(x),
        lambda x: vmap(lambda x: linear_cross_entropy_error(x, w, t))(torch.stack((x, x))),
        dual,
    ):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), f(x))
    torch._dynamo.reset()
    loss: Any = torch.compile(linear_cross_entropy_error, fullgraph=True, backend="aot_eager")
    t[1] = 7
    leaf = x.clone().requires_grad_()
    losses = loss(leaf, w, t, reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False, False]
    (by_x,) = torch.autograd.grad(losses.sum(), leaf)
    assert by_x.isnan().all(1).tolist() == by_x.isnan().any(1).tolist() == losses.isnan().tolist()
    total = loss(leaf, w, t)
    (by_x,) = torch.autograd.grad(total, leaf, torch.full_like(total, torch.inf))
    assert not by_x[t == -100].any()
    mean = loss(leaf, w, t, reduction="mean")
    assert torch.autograd.grad(mean, leaf)[0].isnan().any(1).tolist() == losses.isnan().tolist()
    losses = loss(leaf, w, t, reduction="none", ignore_index=0)
    assert losses.isnan().tolist() == [False, True, True, False, False]
    with torch.autocast(device):
        rounded = loss(x[2:], w, t[2:])
        torch.testing.assert_close(rounded, linear_cross_entropy_error(x[2:], w, t[2:]))


@once
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Its own.
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_second_derivatives(reduction: Any, device: str) -> None:
    """With `backend="eager"`, which leaves them to autograd; other backends refuse them."""
    torch._dynamo.reset()
    x = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor([0, 1, -100, 2, 1], device=device)

    def penalty(loss: Any, x: Tensor, w: Tensor) -> Tensor:
        (by_x,) = torch.autograd.grad(
            loss(x, w, t, reduction=reduction).sum(), x, create_graph=True
        )
        return by_x.square().sum()

    expected = penalty(layer_and_loss, x, w)
    compiled = torch.compile(linear_cross_entropy_error, fullgraph=True, backend="eager")
    for found in (
        penalty(compiled, x, w),
        torch.compile(penalty, backend="eager")(linear_cross_entropy_error, x, w),
    ):
        close(found, expected)
        close(*(torch.autograd.grad(f, (x, w), retain_graph=True) for f in (found, expected)))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of CPU launches, with its kernels marked as ones that may fail."""
    kernels: Any = ops.kernels_of(torch.device("cpu"), "logits")
    monkeypatch.setattr(kernels, "CAN_FAIL", True)
    return kernels.Plan


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_a_graph_whose_kernels_failed_asks_to_be_compiled_again(path: str, failing: Any) -> None:
    torch._dynamo.reset()
    x, w, t = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.zeros(5).long()
    compiled = torch.compile(linear_cross_entropy_error, fullgraph=True, backend="aot_eager")
    compiled(x, w, t)
    with (
        mock.patch.object(failing, "compute", side_effect=RuntimeError("no")),
        pytest.warns(UserWarning, match="a kernel failed"),
        pytest.raises(RuntimeError, match="compile it again"),
    ):
        compiled(x, w, t)
    with pytest.raises(RuntimeError, match=re.escape("torch.compiler.reset()")):
        compiled(x, w, t)
    torch.compiler.reset()
    torch.testing.assert_close(compiled(x, w, t), layer_and_loss(x, w, t))


class LinearLoss(nn.Module):
    def forward(self, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy_error(x, w, t, reduction="mean")


@once
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_and_traced(device: str) -> None:
    """Exported graphs contain no operator of this package."""
    arguments = (torch.randn(5, 4), torch.randn(3, 4), torch.randint(3, (5,)))
    expected = LinearLoss()(*arguments)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        LinearLoss(), arguments, dynamic_shapes=({0: rows}, {}, {0: rows})
    )
    assert "torchlosses" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*arguments), expected)
    torch.testing.assert_close(torch.jit.trace(LinearLoss(), arguments)(*arguments), expected)
    module = LinearCrossEntropyError(4, 3, reduction="mean")
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(arguments[0], arguments[2]), module(*arguments[::2]))
    torch.testing.assert_close(
        torch.fx.experimental.proxy_tensor.make_fx(LinearLoss())(*arguments)(*arguments), expected
    )


# ---- Memory


def peak_memory(call: Callable[[], Any]) -> int:
    """Peak of the bytes that the call allocates, after a first call that fills all caches."""
    call()
    with profile(profile_memory=True) as profiler:
        call()
    events = getattr(profiler.profiler, "kineto_results").events()  # noqa: B009
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(sizes), default=0)


@once
@pytest.mark.parametrize("mode", ["eager", "twice", "none", "compiled", "learned weight", "no_grad",
                                  "compiled, no_grad"])  # fmt: skip
def test_memory_holds_chunks_of_logits_only(mode: str, path: str) -> None:
    """Beyond the gradients one chunk of logits with kernels, a few chunks with the formula."""
    n, d, v, rows = 4096, 8, 1000, 64
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    t = torch.randint(v, (n,))
    options: dict[str, Any] = {"reduction": "none" if mode == "none" else "mean"}
    if mode in ("learned weight", "compiled, no_grad"):
        options["weight"] = torch.ones(v, requires_grad=True)
    loss: Callable[..., Tensor] = linear_cross_entropy_error
    if "compiled" in mode:
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def step() -> Any:
        if "no_grad" in mode:
            with torch.no_grad():
                return loss(x, w, t, **options)
        value = loss(x, w, t, **options).sum()
        if mode == "twice":
            torch.autograd.grad(value, (x, w), retain_graph=True)
        return torch.autograd.grad(value, (x, w))

    with mock.patch.object(linear, "CHUNK_BYTES_PER_CLASS", 4 * rows):
        peak = peak_memory(step)
    chunk, gradients, per_row = 4 * rows * v, x.nbytes + w.nbytes, 16 * n
    if "no_grad" in mode:
        gradients = 0
    chunks = 5 if mode == "learned weight" else 1.1
    times = 2 if mode == "twice" else 1
    assert peak < times * gradients + chunks * chunk + per_row < 4 * n * v / 2


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_memory_of_a_language_model(path: str) -> None:
    # `weights`: sizes of the weight for its gradient, sums in float32, and a float32 copy of it.
    for dtype, (n, d, v), weights in (
        (torch.float32, (1024, 64, 32000), 1),
        (torch.bfloat16, (2048, 64, 32000), 5),
    ):
        x = torch.randn(n, d).to(dtype).requires_grad_()
        w = torch.randn(v, d).to(dtype).requires_grad_()
        t = torch.randint(v, (n,))

        def step(x: Tensor = x, w: Tensor = w, t: Tensor = t) -> Any:
            return torch.autograd.grad(linear_cross_entropy_error(x, w, t), (x, w))

        with (
            mock.patch.object(linear, "CHUNK_BYTES_PER_CLASS", CHUNK),
            mock.patch.object(linear, "BLOCK", 4096),
        ):
            peak = peak_memory(step)
        assert peak < linear.MAX_CPU_CHUNK_BYTES + 2**20 + x.nbytes + weights * w.nbytes


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("v", [8016, 50])
def test_half_precision_accumulates_in_the_gradient_itself(
    v: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sixteenth, in each size, of 8192 rows, 4096 features and 128,256 classes.

    Beyond the gradients only chunks of logits are allocated. The error is at most twice that of one
    product, also with few classes, where each sums over many rows.
    """
    n, d = 512, 256
    monkeypatch.setattr(linear, "CHUNK_BYTES_PER_CLASS", CHUNK // 16)
    monkeypatch.setattr(linear, "has_fast_matmul", lambda device, dtype: True)
    x, w = torch.randn(n, d), torch.randn(v, d) / 16
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (x, w)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    t = torch.randint(v, (n,))

    def step() -> Any:
        return torch.autograd.grad(linear_cross_entropy_error(leaves[0], leaves[1], t), leaves)

    assert (
        v == 50 or peak_memory(step) - sum(leaf.nbytes for leaf in leaves) <= leaves[1].nbytes / 2
    )
    expected = torch.autograd.grad(layer_and_loss(exact[0], exact[1], t), exact)
    reference = torch.autograd.grad(layer_and_loss(leaves[0], leaves[1], t), leaves)
    for ours, theirs, right in zip(step(), reference, expected, strict=True):
        assert (ours - right).norm() <= 2 * (theirs - right).norm()


# ---- Errors


def words(*texts: object) -> str:
    return ".*".join(re.escape(str(text)) for text in texts)


ONES = torch.ones
LOGITS = ("logits of shape", (5, 3))
BAD: list[tuple[type[Exception], str, Any, tuple[object, ...]]] = [
    (ValueError, "input", ONES(()), ("got shape ()", "expected (..., D)")),
    (TypeError, "input", ONES(5, 4).int(), ("got dtype torch.int32", "floating")),
    (ValueError, "linear_weight", ONES(4), ((4,), (5, 4), "(V, 4)")),
    (ValueError, "linear_weight", ONES(4, 3), ((4, 3), (5, 4), "(V, 4)")),
    (ValueError, "linear_weight", ONES(1, 3, 4), ((1, 3, 4), "(V, 4)")),
    (ValueError, "linear_weight", ONES(3, 4, device="meta"), ("meta", "expected cpu")),
    (TypeError, "linear_weight", ONES(3, 4).double(), ("float64", "expected torch.float32")),
    (TypeError, "linear_weight", ONES(3, 4).int(), ("int32", "expected torch.float32")),
    (TypeError, "linear_weight", ONES(3, 4).to(torch.complex64), ("complex64", "real")),
    (TypeError, "linear_weight", None, ("got NoneType", "torch.Tensor")),
    (ValueError, "linear_bias", ONES(4), ((4,), (3, 4), (3,))),
    (ValueError, "linear_bias", ONES(1, 3), ((1, 3), (3,))),
    (ValueError, "linear_bias", ONES(3, device="meta"), ("meta", "expected cpu")),
    (TypeError, "linear_bias", ONES(3).half(), ("float16", "expected torch.float32")),
    (TypeError, "linear_bias", 1.0, ("got float", "torch.Tensor")),
    (ValueError, "target", ONES(5, 4).long(), ((5, 4), *LOGITS, (5,))),
    (ValueError, "target", ONES(4).long(), ((4,), *LOGITS, (5,))),
    (TypeError, "target", ONES(5), ("float32", (5,), *LOGITS, "integer", "the same shape")),
    (IndexError, "target", torch.tensor([0, 1, 2, 3, -5]), ("class 3 at position (3,)", "0 to 2")),
    (IndexError, "target", torch.tensor([0, -100, 2, 2, -5]), ("class -5 at position (4,)", -100)),
    (ValueError, "weight", ONES(4), ((4,), *LOGITS, (3,))),
    (ValueError, "sample_weight", ONES(4), ((4,), (5,))),
    (ValueError, "reduction", "none ", ("none ", "batchmean")),
    (ValueError, "delta", -1, (-1,)),
    (ValueError, "label_smoothing", 2, (2, "[0, 1]")),
]


@pytest.mark.parametrize(("error", "name", "value", "texts"), BAD, ids=str)
def test_invalid_arguments(
    error: type[Exception], name: str, value: Any, texts: Sequence[object], path: str
) -> None:
    arguments: dict[str, Any] = {"input": ONES(5, 4), "linear_weight": ONES(3, 4)}
    arguments |= {"target": torch.zeros(5, dtype=torch.int64), name: value}
    with pytest.raises(error, match=words(f"{name}: ", *texts)):
        linear_cross_entropy_error(**arguments)


def test_a_bad_class_is_reported_by_its_position_in_the_whole_target(path: str) -> None:
    x, w = torch.ones(3, 5, 4), torch.ones(3, 4)
    t = torch.zeros(3, 5, dtype=torch.int64)
    t[2, 1] = 3
    with pytest.raises(IndexError, match=words("class 3 at position (2, 1)")):
        linear_cross_entropy_error(x, w, t)


def test_a_label_beyond_int64_is_not_the_ignore_index(path: str, device: str) -> None:
    """In the kernels; in graphs nothing checks the labels before."""
    kernels = ops.kernels_of(torch.device(device), "logits")
    call = Call("logits", True, 1, "none", 2**63 - 1, torch.float32, 1e-7)
    t = torch.tensor([0, 2**63 - 1, 2**63], dtype=torch.uint64, device=device)
    x, w = torch.ones(3, 4, device=device), torch.ones(2, 4, device=device)
    if kernels is not None:
        tensors = (x, w, None, t, None, None)
        plan = linear.LayerKernels(torch.float32, kernels).prepare(call, *tensors)
        losses, *_ = plan.compute(*tensors, (False,) * 4)
        assert losses.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_soft_targets_are_checked_under_anomaly_detection(path: str) -> None:
    x, w, t = torch.ones(5, 4), torch.ones(3, 4), torch.full((5, 3), 1 / 3)
    t[2] = 3
    with torch.autograd.set_detect_anomaly(True):
        with pytest.warns(UserWarning, match=words("target: the row at position (2,)")) as caught:
            linear_cross_entropy_error(x, w, t)
        assert caught[0].filename == __file__
        linear_cross_entropy_error(x, w, t, sample_weight=torch.tensor([1, 1, 0, 1, 1]))
        linear_cross_entropy_error(x, w, torch.zeros(5).long())


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_falls_back_to_the_formula_if_a_kernel_fails(path: str, failing: Any) -> None:
    x, w, t = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.zeros(5).long()
    for value in (None, linear_cross_entropy_error(x, w, t, reduction="none").sum()):

        def step(value: Tensor | None = value) -> Tensor:
            loss = linear_cross_entropy_error(x, w, t) if value is None else value
            return torch.autograd.grad(loss, x)[0]

        with (
            mock.patch.object(failing, "compute", side_effect=RuntimeError("no")),
            mock.patch.object(ops, "_failed", set()),
            pytest.warns(UserWarning, match="a kernel failed"),
        ):
            found = step()
        torch.testing.assert_close(found, torch.autograd.grad(layer_and_loss(x, w, t), x)[0])


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_other_errors_do_not_disable_the_kernels(path: str) -> None:
    """Such as a failed allocation, which on a CPU is a plain RuntimeError."""
    x, w, t = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.zeros(5).long()
    losses = linear_cross_entropy_error(x, w, t, reduction="none")
    for step in (
        lambda: linear_cross_entropy_error(x, w, t),
        lambda: linear_cross_entropy_error(x.detach(), w, t),
        lambda: torch.autograd.grad(losses.sum(), x),
    ):
        with (
            mock.patch.object(torch, "mm", side_effect=RuntimeError("can't allocate memory")),
            pytest.raises(RuntimeError, match="allocate"),
        ):
            step()
    assert not ops._failed


# ---- The module


def test_module_agrees_with_the_function(device: str) -> None:
    options: dict[str, Any] = {
        "reduction": "mean", "delta": 1e-3, "ignore_index": 2, "label_smoothing": 0.25,
        "weight": torch.rand(3, device=device),
    }  # fmt: skip
    module = LinearCrossEntropyError(4, 3, bias=True, device=device, **options)
    x, t = torch.randn(5, 4, device=device), torch.tensor([0, 1, 2, 1, 0], device=device)
    w = torch.rand(5, device=device)
    expected = layer_and_loss(
        x, module.linear.weight, t, linear_bias=module.linear.bias, sample_weight=w, **options
    )
    torch.testing.assert_close(module(x, t, sample_weight=w), expected)
    assert [name for name, _ in module.named_parameters()] == ["linear.weight", "linear.bias"]
    assert repr(module) == (
        "LinearCrossEntropyError(\n"
        "  weight=tensor of (3,), reduction='mean', delta=0.001, ignore_index=2, "
        "label_smoothing=0.25\n"
        "  (linear): Linear(in_features=4, out_features=3, bias=True)\n)"
    )
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert repr(twin) == repr(module)
        assert twin(x, t) == module(x, t)
    half = LinearCrossEntropyError(4, 3, dtype=torch.bfloat16)
    assert half.linear.weight.dtype == torch.bfloat16
    assert half.linear.bias is None


def test_module_loads_the_state_of_torch_s_module() -> None:
    torch_module = getattr(nn, "LinearCrossEntropyLoss", None)
    if torch_module is None:
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    theirs = torch_module(4, 3, bias=True, weight=torch.rand(3), label_smoothing=0.1)
    ours = LinearCrossEntropyError(
        4, 3, bias=True, weight=torch.ones(3), label_smoothing=0.1, delta=0, reduction="mean"
    )
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(5, 4), torch.tensor([0, 1, 2, -100, 0])
    torch.testing.assert_close(ours(x, t), theirs(x, t))


def test_module_checks_its_options_at_construction() -> None:
    for changed in ({"reduction": "avg"}, {"delta": -1.0}, {"label_smoothing": 1.5},
                    {"weight": torch.ones(4)}, {"weight": torch.ones(1, 3)}):  # fmt: skip
        with pytest.raises(ValueError, match=words(next(iter(changed)), "got", "expected")):
            LinearCrossEntropyError(4, 3, **changed)


@once
def test_tied_embeddings_learn(device: str) -> None:
    """One weight for the input embedding and the output layer."""
    embedding = nn.Embedding(10, 16, device=device)
    hidden = nn.Linear(16, 16, device=device)
    optimizer = torch.optim.Adam([*embedding.parameters(), *hidden.parameters()], 0.02)
    words = torch.arange(10, device=device).repeat(4)
    following = (words + 1) % 10
    for _ in range(60):
        optimizer.zero_grad()
        loss = linear_cross_entropy_error(
            hidden(embedding(words)), embedding.weight, following, delta=0, reduction="mean"
        )
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert np.isfinite(loss.item())


# ---- Random calls


def check_random_call(seed: int) -> None:
    """Random shapes, strides, dtypes and options, against layer and loss in float64."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    def one_in(number: int) -> bool:
        return bool(rng.integers(number) == 0)

    def with_random_layout(tensor: Tensor) -> Tensor:
        layout = one_of("contiguous", "contiguous", "permuted", "sliced", "offset", "expanded")
        return calls.with_layout(tensor, layout, rng)

    dtype = one_of(torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    wide = torch.promote_types(dtype, torch.float32)
    rows = [int(size) for size in rng.integers(0 if one_in(8) else 1, 6, rng.integers(0, 4))]
    width, classes = int(rng.integers(not one_in(8), 9)), int(one_of(1, 2, 5, 17, 70))
    x = torch.randn(*rows, width).to(dtype)
    named: dict[str, Any] = {
        "linear_weight": with_random_layout(torch.randn(classes, width).to(dtype)),
        "reduction": one_of(*REDUCTIONS),
        "delta": one_of(1e-7, 0, 0.1, 3.0),
        "label_smoothing": one_of(0.0, 0.0, 0.1, 1.0),
    }
    ignore_index = one_of(-100, 0, 1)
    named["target"] = with_random_layout(torch.randn(*rows, classes).softmax(-1).to(dtype))
    if one_in(2):
        target = torch.randint(classes, tuple(rows))
        target = target.where(torch.rand(tuple(rows)) < 0.7, ignore_index)
        named["ignore_index"] = ignore_index
        named["target"] = with_random_layout(target.to(one_of(torch.int64, torch.int16)))
    has_nan = x.numel() > 0 and classes > 2 and one_in(8)  # In the last row, which counts.
    if has_nan:
        x.view(-1)[-1] = torch.nan
        if not named["target"].is_floating_point():
            named["target"] = named["target"].clone()
            named["target"][(-1,) * len(rows)] = classes - 1
    named["input"] = with_random_layout(x)
    if one_in(2):
        named["linear_bias"] = with_random_layout(torch.randn(classes).to(dtype))
    if one_in(2):
        named["weight"] = with_random_layout(torch.rand(classes).to(one_of(dtype, wide)))
    if one_in(2):
        named["sample_weight"] = torch.rand(rows[int(rng.integers(len(rows) + 1)) :])
        named["sample_weight"] = named["sample_weight"].to(one_of(dtype, wide))
    names = [
        name
        for name in NAMES
        if getattr(named.get(name), "dtype", torch.int64).is_floating_point
        and (name in NAMES[:3] or one_in(3))
    ]
    leaves = {name: named[name].detach().requires_grad_() for name in names}
    exact = {
        name: value.detach().double() if value.is_floating_point() else value
        for name, value in named.items()
        if isinstance(value, Tensor)
    }
    exact_leaves = {name: exact[name].requires_grad_() for name in names}
    if not named["target"].is_floating_point() and x.shape[:-1].numel() and one_in(8):
        bad = named["target"].clone()
        bad[(0,) * len(rows)] = one_of(-5, classes + 1)
        with pytest.raises(IndexError, match="target: got class"):
            linear_cross_entropy_error(**named | leaves | {"target": bad})
    loss = linear_cross_entropy_error(**named | leaves)
    expected = layer_and_loss(**named | exact)
    eps = 2e-15 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    size = max(int(np.prod(rows)) * classes * width, 1) ** 0.5

    def assert_near(found: Tensor, expected: Tensor, eps: float, name: str) -> None:
        largest = expected.detach().nan_to_num().abs().max() if expected.numel() else 0
        torch.testing.assert_close(
            found.double(), expected, rtol=40 * eps, atol=8 * eps * size * (1 + float(largest)),
            equal_nan=True, msg=lambda message: f"{name}: {message}",
        )  # fmt: skip

    assert_near(loss, expected, eps, "loss")
    with torch.no_grad():
        assert_near(linear_cross_entropy_error(**named | leaves), expected, eps, "no_grad")
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = linear_cross_entropy_error(**named)
        assert_near(rounded, expected, 2 * torch.finfo(torch.bfloat16).eps, "autocast")
    upstream = torch.rand(loss.shape, dtype=loss.dtype)
    expected_grads = torch.autograd.grad(
        expected, tuple(exact_leaves.values()), upstream.double(), retain_graph=True
    )
    for _ in range(2):
        grads = torch.autograd.grad(loss, tuple(leaves.values()), upstream, retain_graph=True)
        for name, found, wanted in zip(names, grads, expected_grads, strict=True):
            assert_near(found, wanted, eps, name)
    if dtype != torch.float64 or has_nan:
        return
    doubles = [
        torch.autograd.grad(
            torch.stack(
                [
                    (g * g.detach().cos()).sum()
                    for g in torch.autograd.grad(value.sum(), tuple(by.values()), create_graph=True)
                ]
            ).sum(),
            by["input"],
            allow_unused=True,
        )[0]
        for value, by in ((loss, leaves), (expected, exact_leaves))
    ]
    if doubles[1] is not None:
        scale = 1 + float(doubles[1].abs().max()) if doubles[1].numel() else 1
        torch.testing.assert_close(*doubles, rtol=1e-8, atol=1e-9 * scale * size)


@pytest.mark.parametrize("seed", range(0, 200, 50))
def test_a_few_hundred_calls(seed: int, path: str) -> None:
    for number in range(seed, seed + 50):
        check_random_call(number)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1000, 1000 + FUZZ_CASES, 1000))
def test_many_calls(seed: int, path: str) -> None:
    for number in range(seed, seed + 1000):
        check_random_call(number)
