"""Properties that need a GPU: no synchronization, deterministic sums, CUDA graphs, large tensors.

To look for invalid accesses and races:

    compute-sanitizer --tool memcheck python -m pytest tests/test_cuda.py -k every_kernel
    compute-sanitizer --tool racecheck python -m pytest tests/test_cuda.py -k every_kernel
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paths import use_kernels
from torch import Tensor

from torchlosses import linear, ops
from torchlosses.functional import (
    cross_entropy_error,
    linear_cross_entropy_error,
    sum_squared_error,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"

LOGITS = {"from_logits": True}
# A loss and its options for every kernel.
FORMS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "squares": (sum_squared_error, {}),
    "probabilities": (cross_entropy_error, {}),
    "probabilities, smoothed": (cross_entropy_error, {"label_smoothing": 0.1}),
    "logits": (cross_entropy_error, LOGITS),
    "logits, no guard": (cross_entropy_error, LOGITS | {"delta": 0}),
    "logits, smoothed": (cross_entropy_error, LOGITS | {"label_smoothing": 0.1}),
}
# Rows of one tile; rows of several; more samples than the loss kernel counts itself; samples in the
# last dimension, with few classes and with many.
SHAPES = [(37, 1000), (5, 20_011), (4099, 10), (3, 21, 33, 65), (2, 150, 5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def calls(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: Any
) -> Iterator[tuple[str, Callable[..., Tensor], Tensor, dict[str, Any]]]:
    """A name, the loss, its input and its other arguments."""
    samples = (shape[0], *shape[2:])
    for name, (loss, options) in FORMS.items():
        for is_index in (False, True):
            y = torch.rand(shape, device=DEVICE).softmax(1).to(dtype).requires_grad_()
            target = torch.rand(shape, device=DEVICE).softmax(1).to(dtype)
            if is_index:
                target = torch.randint(shape[1], samples, device=DEVICE)
                target.view(-1)[::7] = -100
            weights = shape if name == "squares" and not is_index else samples
            weighted = {"sample_weight": torch.rand(weights, device=DEVICE)}
            if name != "squares":
                weighted["weight"] = torch.rand(shape[1], device=DEVICE)
            for extra in ({}, weighted):
                arguments: dict[str, Any] = {"target": target} | extra | options
                yield f"{name}, {is_index=}", loss, y, arguments | {"reduction": reduction}


def gradient(loss: Callable[..., Tensor], y: Tensor, arguments: dict[str, Any]) -> Any:
    value = loss(y, **arguments)
    (grad,) = torch.autograd.grad(value, y, torch.full_like(value, 0.5))
    return value.detach(), grad  # The autograd graph would keep the leaf on its stream.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_every_kernel_agrees_with_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ulp = torch.finfo(dtype).eps
    for name, loss, y, arguments in calls(shape, dtype, reduction):
        assert ops.KERNEL_LOADERS["cuda"](y.device) is not None
        value, grad = gradient(loss, y, arguments)
        assert not ops._failed
        exact = {
            key: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in arguments.items()
        }
        with monkeypatch.context() as patch:
            use_kernels(patch, {})
            expected = gradient(loss, y.detach().double().requires_grad_(), exact)
        for ours, theirs, rtol in ((value, expected[0], 3e-6), (grad, expected[1], max(ulp, 2e-5))):
            limit = torch.finfo(ours.dtype).max
            torch.testing.assert_close(
                ours.double().clamp(-limit, limit), theirs.clamp(-limit, limit),
                rtol=rtol, atol=1e-6, msg=lambda message: f"{name}: {message}",  # noqa: B023
            )  # fmt: skip


@contextlib.contextmanager
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # The warning comes once per process, after the mode is set.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_losses_do_not_synchronize(reduction: Any) -> None:
    every = [call for dtype in DTYPES for call in calls((64, 50), dtype, reduction)]
    for _, loss, y, arguments in every:  # Triton compiles in the first call.
        gradient(loss, y, arguments)
    with synchronization_is_an_error():
        for _, loss, y, arguments in every:
            gradient(loss, y, arguments)


def test_a_cuda_graph_captures_forward_and_backward() -> None:
    for name, loss, y, arguments in calls((64, 50), torch.float32, "mean"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradient(loss, y, arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradient(loss, y, arguments)
        for _ in range(2):
            with torch.no_grad():
                y.copy_(torch.rand_like(y).softmax(1))
            graph.replay()
            for ours, expected in zip(captured, gradient(loss, y, arguments), strict=True):
                assert torch.equal(ours, expected), name


def test_launches_on_several_streams_do_not_mix_their_sums() -> None:
    """The last program of a launch adds up the partial sums of that launch alone."""
    y = torch.rand(2048, 1000, device=DEVICE)
    target = torch.randint(1000, (2048,), device=DEVICE)
    expected = cross_entropy_error(y, target, from_logits=True)
    streams = [torch.cuda.Stream() for _ in range(8)]
    losses = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(cross_entropy_error(y, target, from_logits=True))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for loss in losses)


def test_results_are_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            for name, loss, y, arguments in calls(shape, torch.float32, "sum"):
                first = gradient(loss, y, arguments)
                for _ in range(5):
                    again = gradient(loss, y, arguments)
                    assert all(map(torch.equal, first, again)), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_class_out_of_range_is_nan_and_no_cuda_error() -> None:
    for name, loss, y, arguments in calls((8, 50), torch.float32, "none"):
        target = arguments["target"]
        if target.dim() == 2:
            continue
        target[:] = torch.tensor([0, 1, 50, 10**12, -1, -100, 3, 4])
        for value in gradient(loss, y, arguments):
            bad = value.view(8, -1).isnan().all(1).tolist()
            assert bad == [False, False, True, True, True, False, False, False], name
    torch.cuda.synchronize()


def test_losses_allocate_their_gradient_and_at_most_1_mb() -> None:
    peak = "requested_bytes.all.peak"  # The bytes requested, not the larger blocks that serve them.
    for name, loss, y, arguments in calls((4096, 4096), torch.float32, "sum"):
        gradient(loss, y, arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()[peak]
        gradient(loss, y, arguments)
        assert torch.cuda.memory_stats()[peak] - before <= y.nbytes + 2**20, name


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("is_index", [False, True])
def test_more_than_2_to_the_31_elements(name: str, is_index: bool) -> None:
    shape = (2**16 + 3, 2**15)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 6 * 2 * shape[0] * shape[1]:
        pytest.skip("the GPU has too little memory")
    loss, options = FORMS[name]
    y = torch.full(shape, 0.5, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    if is_index:
        target = torch.full(shape[:1], shape[1] - 1, device=DEVICE)
    else:
        target = torch.full(shape, 2.0**-10, device=DEVICE, dtype=torch.bfloat16)
    last = slice(shape[0] - 2, None)
    value = loss(y, target, **options)
    (grad,) = torch.autograd.grad(value, y)
    part = y.detach()[last].requires_grad_()
    expected, expected_grad = gradient(loss, part, {"target": target[last]} | options)
    torch.testing.assert_close(value, expected * (shape[0] / 2), rtol=1e-4, atol=0)
    assert torch.equal(grad[last], expected_grad * 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    y = torch.rand(64, 50, device="cuda:1", requires_grad=True)
    sum_squared_error(y, torch.zeros_like(y)).backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, y.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_linear_loss_neither_synchronizes_nor_holds_all_logits(
    dtype: torch.dtype, reduction: Any
) -> None:
    n, d, v = 4 * linear.CHUNK_BYTES_PER_CLASS // dtype.itemsize + 3, 64, 3001
    x, w = (
        (torch.randn(*shape, device=DEVICE) / d**0.25).to(dtype).requires_grad_()
        for shape in ((n, d), (v, d))
    )
    t = torch.randint(v, (n,), device=DEVICE)
    t[::3] = -100

    def step() -> Any:
        losses = linear_cross_entropy_error(x, w, t, reduction=reduction)
        return losses, *torch.autograd.grad(losses.sum(), (x, w))

    step()  # Triton compiles in the first call.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with synchronization_is_an_error():
        found = step()
    # One chunk of logits, the weight's gradient, also in float32, and buffers of the input's size.
    limit = linear.CHUNK_BYTES_PER_CLASS * v + 3 * w.nbytes + 4 * x.nbytes
    assert torch.cuda.max_memory_allocated() - before < limit + 2**22
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, w)]
    logits = leaves[0] @ leaves[1].T
    losses = cross_entropy_error(logits, t, from_logits=True, reduction=reduction)
    exact = (losses, *torch.autograd.grad(losses.sum(), leaves))
    # The relative error of losses and gradients is the absolute error of the logits. A logit is a
    # sum of d products: each addition rounds by eps/2 of the partial sum, in a random direction,
    # and the sum is rounded to its dtype.
    eps = torch.finfo(dtype).eps
    eps_of_sums = min(eps, torch.finfo(torch.float32).eps)
    rtol = float(logits.detach().abs().max()) / 2 * (math.sqrt(d) * eps_of_sums + eps)
    for ours, expected in zip(found, exact, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("form", ["classes", "soft", "learned weight", "autocast"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_cuda_graph_captures_the_linear_loss(form: str, reduction: Any) -> None:
    n, d, v = 2 * linear.CHUNK_BYTES_PER_CLASS // 4 + 3, 64, 1003
    x, w = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((n, d), (v, d)))
    t = torch.randint(v, (n,), device=DEVICE)
    t[::3] = -100
    leaves: tuple[Tensor, ...] = (x, w)
    options: dict[str, Any] = {"reduction": reduction}
    if form == "soft":
        t = torch.randn(n, v, device=DEVICE).softmax(1).requires_grad_()
        leaves += (t,)
    if form == "learned weight":
        options["weight"] = torch.rand(v, device=DEVICE, requires_grad=True)
        leaves += (options["weight"],)

    def step() -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=form == "autocast"):
            loss = linear_cross_entropy_error(x, w, t, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    exact: dict[Tensor, Tensor] = {leaf: leaf.detach().double().requires_grad_() for leaf in leaves}
    if "weight" in options:
        options["weight"] = exact[options["weight"]]
    logits = exact[x] @ exact[w].T
    losses = cross_entropy_error(logits, exact.get(t, t), from_logits=True, **options)
    expected = (losses.detach(), *torch.autograd.grad(losses.sum(), tuple(exact.values())))
    rtol = 32 * torch.finfo(torch.bfloat16 if form == "autocast" else torch.float32).eps
    for ours, theirs in zip(captured, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol * scale)
    assert not ops._failed
