"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time.

The interpreter must be enabled before Triton is imported, so its tests run in a separate process:
`TRITON_INTERPRET=1 python -m pytest -W ignore::RuntimeWarning tests/test_triton.py`.
"""

import contextlib
import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_linear
import torch
from paths import use_kernels
from samples import LINEAR_CROSS_ENTROPIES, REDUCTIONS, SAMPLES, Sample
from test_parity import assert_matches_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from torchlosses import ops
from torchlosses.formulas import Call
from torchlosses.functional import cross_entropy_error, sum_squared_error

triton = pytest.importorskip("triton", reason="this build of torch has no Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from torchlosses.kernels import triton as kernels  # noqa: E402

IS_INTERPRETED = triton.knobs.runtime.interpret
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")

plans: dict[Any, Any] = {}


def find_plan(call: Call, *tensors: Any) -> Any:
    key = (call, *(
        None if t is None else (t.dtype, t.shape, t.stride(), t.device, t.data_ptr() % 16 == 0)
        for t in tensors
    ))  # fmt: skip
    if key not in plans:
        plans[key] = kernels.prepare(call, *tensors)
    return plans[key]


def run(call: Call, *arguments: Any) -> Any:
    return find_plan(call, *arguments[:4]).compute(*arguments)


def rescale(gradients: Any, upstream: Tensor, call: Any = None, target: Any = None) -> Any:
    like = next(gradient for gradient in gradients if gradient is not None)
    if call is None or gradients[0] is None:
        call, target = Call("squares", False, 0, "sum", -100, upstream.dtype), like
    return find_plan(call, like, target, None, None).rescale(gradients, upstream, target)


# Calls that together use every body of `_loss_kernel`.
LOSSES: list[tuple[Any, dict[str, Any]]] = [
    (sum_squared_error, {}),
    (cross_entropy_error, {}),
    (cross_entropy_error, {"from_logits": True}),
    (cross_entropy_error, {"from_logits": True, "delta": 0}),
    (cross_entropy_error, {"from_logits": True, "label_smoothing": 0.1}),
]


@compiled
def test_passes_in_the_interpreter() -> None:
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("the interpreter of Triton 3.6 cannot read loop bounds from NumPy 2.4")
    folder = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
         # The interpreter computes by NumPy, which warns of results that are ∞ or NaN, and of a
         # conversion in Triton 3.6.
         "-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning",
         # A launch takes some ms, so these are left out: gradient checks by finite differences (a
         # thousand launches each), what autograd does after a kernel, float64 (tested in small
         # tiles), and all but one reduction of bfloat16.
         "-k", "not formula and not gradcheck and not gradgradcheck and not torch.float16 "
         "and not changes_before_backward and not upstream_gradient_any_number "
         "and not (matches_reference and torch.float64) "
         "and not -sum-torch.bfloat16 and not -batchmean-torch.bfloat16",
         *(folder / f"test_{name}.py" for name in ("triton", "parity", "gradients", "fuzz"))],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) > 1.5 * len(SAMPLES)  # type: ignore[index]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a tile, more blocks than programs, 64-bit offsets, a divisor kernel."""
    configure, constants = kernels.tiles.configure, kernels.blocks.Constants

    def small(body: str, classes: int, *rest: Any, **options: Any) -> Any:
        width = min(triton.next_power_of_2(classes), 4)
        return configure(body, classes, *rest, **options)._replace(
            samples=2,
            classes=width,
            max_programs=2,
            is_whole=False,
            vector_size=max(width // 2, 1),
            vectors=1,
        )

    def wide(**values: Any) -> Any:
        return constants(**values | {"INDEX": triton.language.int64})

    monkeypatch.setattr(sys.modules[__name__], "plans", {})
    monkeypatch.setattr(ops, "_prepared", {})
    monkeypatch.setattr(kernels, "_workspaces", {})
    monkeypatch.setattr(kernels, "configure", small)
    monkeypatch.setattr(kernels, "Constants", wide)
    for name, value in {
        "MAX_PROGRAMS": 2,
        "MAX_DIVISOR_PROGRAMS": 2,
        "LOCAL_DIVISOR_SAMPLES": 0,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    for module in (kernels, kernels.kernels):
        monkeypatch.setattr(module, "DIVISOR_BLOCK", triton.language.constexpr(4))


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_small_tiles_match_the_reference() -> None:
    is_hard = re.compile("sse-|ce-(corners|hard|nan|all)").match
    for sample in SAMPLES:
        reduction = sample.options.get("reduction")
        if reduction == "mean" or (reduction == "none" and is_hard(sample.name)):
            assert_matches_reference(sample, torch.float64, "cpu")


@interpreted
def test_linear_layers_match_the_reference() -> None:
    """The gradient of the logits overwrites them."""
    for sample in LINEAR_CROSS_ENTROPIES:
        if sample.input.ndim == 2:
            test_linear.assert_matches_reference(sample, torch.float32, "cpu")


@interpreted
def test_means_without_gradients_match_the_reference() -> None:
    """`_loss_kernel` then computes loss and divisor in the same loop."""
    for sample in SAMPLES:
        if sample.options.get("reduction") == "mean":
            input, target, options = sample.tensors(torch.float64)
            value = sample.function(input, target, **options)
            expected = torch.tensor(sample.reference()[0])
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert not any(
        counter.any()
        for workspaces in kernels._workspaces.values()
        for _, counter in workspaces.by_stream.values()
    )


def target_gradient(sample: Sample) -> Tensor:
    input, target, options = sample.tensors(torch.float64)
    losses = sample.function(input, target.requires_grad_(), **options)
    (grad,) = torch.autograd.grad(losses.sum(), target)
    return grad


@interpreted
@pytest.mark.parametrize("tiles", ["usual", "small"])
def test_target_gradients(
    tiles: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula. Samples with p = 0 are left out, where −log p is infinite."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    is_soft = re.compile("sse-dense|ce-[a-z]*-soft").match
    soft = [
        s for s in SAMPLES
        if is_soft(s.name) and s.options["reduction"] == "none" and s.input.size <= 24
    ]  # fmt: skip
    ours = list(map(target_gradient, soft))
    use_kernels(monkeypatch, {})
    for sample, grad in zip(soft, ours, strict=True):
        torch.testing.assert_close(grad, target_gradient(sample), msg=sample.name)


@interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_times_upstream(reduction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, with upstream gradients per element or sample, contiguous or not."""

    def gradients() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for shape, dim in (((3, 5), 1), ((5, 3), 0), ((2, 5, 3), 1)):
            samples = shape[:dim] + shape[dim + 1 :]
            for loss, options in LOSSES:
                is_per_element = loss is sum_squared_error
                for target in (
                    torch.rand(shape, generator=generator),
                    torch.randint(5, samples, generator=generator),
                ):
                    rows = (*shape[:dim], 1, *shape[dim + 1 :])
                    size = rows if is_per_element and target.shape == shape else samples
                    weight = torch.rand(size, generator=generator)
                    y = torch.rand(shape, generator=generator).half().requires_grad_()
                    for sample_weight in (None, weight):
                        value = loss(
                            y, target, dim=dim, reduction=reduction, sample_weight=sample_weight,
                            **options,
                        )  # fmt: skip
                        upstream = torch.rand(value.shape[::-1], generator=generator)
                        upstream = upstream.permute(tuple(reversed(range(value.dim()))))
                        for each in (upstream, upstream.contiguous()):
                            yield torch.autograd.grad(value, y, each, retain_graph=True)[0]

    ours = list(gradients())
    use_kernels(monkeypatch, {})
    for grad, expected in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=2**-10, atol=2**-24)


SHAPES: list[tuple[int, ...]] = [(2, 1023), (3, 1025), (2, 17_001), (130, 10), (2, 130, 67)]


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_index", [False, True])
def test_sizes_around_a_tile(shape: tuple[int, ...], dtype: torch.dtype, is_index: bool) -> None:
    y = torch.rand(shape).to(dtype)
    target = torch.rand(shape).to(dtype)
    if is_index:
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
    for loss, options in LOSSES:
        ours, exact = (x.detach().clone().requires_grad_() for x in (y, y.double()))
        value = loss(ours, target, **options)
        value.backward()
        with pytest.MonkeyPatch.context() as patch:
            use_kernels(patch, {})
            expected = loss(exact, target if is_index else target.double(), **options)
            expected.backward()
        torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=1e-6)
        assert ours.grad is not None
        assert exact.grad is not None
        rtol = 2**-7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_at_the_lowest_finite_number(dtype: torch.dtype) -> None:
    x = torch.full((2, 2**14 + 9), torch.finfo(dtype).min, dtype=dtype)
    expected = x.new_tensor(float(x.shape[1])).log().expand(2)
    for target in (torch.tensor([0, x.shape[1] - 1]), torch.ones_like(x) / x.shape[1]):
        loss = cross_entropy_error(x, target, from_logits=True, delta=0, reduction="none")
        torch.testing.assert_close(loss, expected)
    x[:, ::2] = -torch.inf
    loss = cross_entropy_error(x, torch.tensor([1, 3]), from_logits=True, reduction="none")
    torch.testing.assert_close(loss, -(1 / x.isfinite().sum(1).to(dtype) + 1e-7).log())


@interpreted
@pytest.mark.parametrize("tiles", ["whole", "small"])
def test_infinite_logits_of_classes_without_weight(
    tiles: str, request: pytest.FixtureRequest
) -> None:
    """0 · ∞ is NaN by a class weight of 0, and 0 by a target of 0."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    x = torch.randn(2, 9)
    x[:, 3] = -torch.inf
    target = torch.full((2, 9), 1 / 8)
    target[1, 3] = 0
    weight = torch.ones(9)
    weight[3] = 0
    loss = cross_entropy_error(
        x, target, weight=weight, from_logits=True, delta=0, reduction="none"
    )
    assert loss.isnan().tolist() == [True, False]


def calls(reduction: str, *, is_index: bool, dtype: torch.dtype = torch.float32) -> Iterator[Call]:
    """One call for each variant of `_loss_kernel`."""
    call = functools.partial(Call, is_index=is_index, dim=1, reduction=reduction, ignore_index=-100)
    yield call(kind="squares", dtype=dtype)
    for kind in ("probabilities", "logits"):
        for delta in (1e-7, 0.0):
            for label_smoothing in (0.0, 0.1)[: 1 + is_index]:
                yield call(kind=kind, dtype=dtype, delta=delta, label_smoothing=label_smoothing)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "far"),
    [(getattr(torch, f"{sign}int{bits}"), 2**62 >> (64 - bits)) for sign in ("", "u")
     for bits in (8, 16, 32, 64)] + [(torch.uint64, 2**64 - 100)],
)  # fmt: skip
def test_invalid_labels_give_nan(dtype: torch.dtype, far: int) -> None:
    """Labels are not checked before, and no unsigned one equals an `ignore_index` of −100."""
    target = torch.tensor([1, far, 3, 0], dtype=dtype)
    ignored = [False] * 4
    if dtype.is_signed:
        target, ignored = torch.cat([target, target.new_tensor([-100])]), [*ignored, True]
    y = torch.rand(len(target), 3)
    for call in calls("none", is_index=True):
        loss, *_ = run(call, y, target, None, None, (False, False))
        upstream = torch.ones_like(loss)
        _, grad, _ = run(call, y, target, None, None, (True, False), upstream)
        assert grad is not None
        for values in (loss.view(len(y), -1), grad):
            assert values.isnan().all(1).tolist()[:4] == [False, True, True, False]
            assert (values == 0).all(1).tolist() == ignored
        mean = call._replace(reduction="mean")
        loss, grad, _ = run(mean, y, target, None, None, (True, False))
        assert grad is not None
        assert loss.isnan()
        assert grad.isnan().all(1).tolist()[:4] == [False, True, True, False]
        assert grad[[0, 3]].isfinite().all()


@interpreted
def test_offsets_beyond_2_to_the_31() -> None:
    y = torch.from_numpy(np.zeros((3, 2**30), np.float16))  # Pages are allocated when touched.
    y[2, -1] = 0.5
    assert cross_entropy_error(y[2:], torch.tensor([2**30 - 1]), delta=0) == torch.tensor(2.0).log()
    loss = cross_entropy_error(y, torch.tensor([0, 0, 2**30 - 1]), delta=0.5, reduction="none")
    torch.testing.assert_close(loss, -torch.tensor([0.5, 0.5, 1.0]).log())


@interpreted
@pytest.mark.parametrize("ignore_index", [2**63 - 1, -100])
def test_labels_beyond_int64_are_not_ignored(ignore_index: int) -> None:
    call = Call("logits", True, 1, "none", ignore_index, torch.float32, 1e-7)
    target = torch.tensor([0, ignore_index % 2**64, 2**63 + 5], dtype=torch.uint64)
    losses, *_ = run(call, torch.rand(3, 5), target, None, None, (False, False))
    assert losses.isnan().tolist() == [False, ignore_index < 0, True]


@interpreted
def test_rescale_multiplies_in_place() -> None:
    gradient = torch.rand(5000).bfloat16()
    for factor in (torch.tensor(1.0), torch.tensor(0.5)):
        expected = gradient * factor
        none, rescaled = rescale((None, gradient), factor)
        assert none is None
        assert rescaled is not None
        assert rescaled.data_ptr() == gradient.data_ptr()
        assert torch.equal(rescaled, expected.bfloat16())


# Compiling all kernels for all capabilities takes minutes, so each capability compiles one in
# SHARE of them.
CAPABILITIES = (80, 90, 100)
SHARE = int(os.environ.get("SHARE", "3"))
TRITON_RUN = JITFunction.run


def use_target(device: int, capability: int) -> None:
    """Makes Triton compile for a GPU that does not exist."""
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_device=lambda: device,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
    )


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Any]]]:
    """A function that makes launches compile for a capability, and returns a list of binaries."""
    binaries: list[Any] = []
    numbers = itertools.count()

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        if next(numbers) % SHARE == 0:
            binary = TRITON_RUN(kernel, *arguments, **options | {"warmup": True})
            binaries.append((kernel.__name__, binary))

    def start(capability: int) -> list[Any]:
        nonlocal numbers
        numbers = itertools.count(CAPABILITIES.index(capability))
        use_target(capability, capability)  # Triton caches binaries by device.
        return binaries

    monkeypatch.setattr(JITFunction, "run", run)
    yield start
    with contextlib.suppress(RuntimeError):  # Without a GPU there is no driver to reset to.
        triton.runtime.driver.reset_active()


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(shape: tuple[int, ...], dtype: torch.dtype, *, has_all_options: bool) -> None:
    """Launches every variant of `_loss_kernel`, and the other kernels."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    samples = (shape[0], *shape[2:])
    y, soft, index = tensor(shape, dtype), tensor(shape, dtype), tensor(samples, torch.int64)
    weight = tensor(shape[1:2], compute) if has_all_options else None
    for is_index, target in ((False, soft), (True, index)):
        needs = (True, has_all_options and not is_index)
        for call in calls("mean" if has_all_options else "sum", is_index=is_index, dtype=compute):
            sizes = (shape[0], 1, *shape[2:]) if call.kind == "squares" else samples
            sizes = samples if is_index else sizes
            run(
                call, y, target, None if call.kind == "squares" else weight,
                tensor(sizes, compute) if has_all_options else None, needs,
            )  # fmt: skip
            if has_all_options and call.delta == 0:
                none = call._replace(reduction="none")
                losses = shape if call.kind == "squares" else samples
                run(none, y, target, None, None, needs, tensor(losses, compute))
    rescale([y], tensor((), compute))
    rescale([y], tensor((), compute), call, target)


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(
    capability: int, compile_for: Callable[[int], list[Any]], tmp_path: Path
) -> None:
    binaries = compile_for(capability)
    # Rows of one tile and of several; few classes; and strided classes.
    for shape, dtype, has_all_options in (
        ((4096, 4096), torch.float32, True),
        ((4096, 32768), torch.float32, False),
        ((4096, 32768), torch.bfloat16, True),
        ((8192, 50257), torch.bfloat16, False),
        ((4096, 10), torch.float64, True),
        ((65536, 10), torch.bfloat16, False),
        ((16, 21, 512 * 512), torch.bfloat16, False),
        ((2, 100, 2**25), torch.bfloat16, True),
    ):
        launch_all(shape, dtype, has_all_options=has_all_options)
    y, target = tensor((4096, 10), torch.float32), tensor((4096,), torch.int64)
    for call in calls("mean", is_index=True):
        run(call, y, target, None, None, (False, False))
    assert {name for name, _ in binaries} == {"_loss_kernel", "_divisor_kernel", "_rescale_kernel"}
    assert_no_spills(binaries, tmp_path)


def assert_no_spills(binaries: list[Any], folder: Path) -> None:
    path = folder / "kernel.cubin"
    for name, binary in {id(binary): (name, binary) for name, binary in binaries}.values():
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
        assert stack == 0, f"{name} spills at {registers} registers"


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_vectors_of_an_upstream_gradient_are_of_contiguous_elements(
    capability: int, compile_for: Callable[[int], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expanded one, as `sum().backward()` makes, has one element in memory."""
    monkeypatch.setattr(sys.modules[__name__], "SHARE", 1)
    binaries = compile_for(capability)
    y, target = tensor((4096, 64), torch.float32), tensor((4096,), torch.int64)
    call = Call("squares", True, 1, "none", -100, torch.float32)
    for upstream in (
        None,
        tensor((1, 1), torch.float32).expand(4096, 64),
        tensor(y.shape, y.dtype),
    ):
        run(call, y, target, None, None, (True, False), upstream)
    alone, expanded, contiguous = (
        len(re.findall(r"\bld\.global(\.\w+)*\.v4\b", binary.asm["ptx"])) for _, binary in binaries
    )
    assert 0 < alone == expanded == contiguous / 2


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_classes_of_a_pixel_lie_in_one_thread(
    capability: int, compile_for: Callable[[int], list[Any]], tmp_path: Path
) -> None:
    """It holds two pixels: one load of both per class, and no exchange before the sum."""
    binaries = compile_for(capability)
    for classes in (3, 21, 32):
        for dtype in (torch.bfloat16, torch.float16):
            for delta in (1e-7, 0.0):
                call = Call("logits", True, 1, "sum", -100, torch.float32, delta)
                x = tensor((16, classes, 512, 512), dtype)
                target = tensor((16, 512, 512), torch.int64)
                before = len(binaries)
                run(call, x, target, None, None, (True, False))
                for _, binary in binaries[before:]:
                    code = binary.asm["ptx"]
                    assert len(re.findall(r"\bbar(rier)?\.sync\b", code)) <= 8
                    assert len(re.findall(r"\bld\.global(\.\w+)*\.b32\b", code)) >= classes
    assert_no_spills(binaries, tmp_path)


class Binary:
    """A stub of a compiled kernel: its launch asserts that Triton would select it too."""

    function = packed_metadata = None
    launches = 0

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, stream: int | None) -> None:
        first, *rest = arguments
        if isinstance(first, tuple):
            first = kernels.blocks.KernelArgs(*first)
        else:  # The gradient of `_rescale_kernel`.
            assert rest[2] == first.numel()
        assert TRITON_RUN(self.kernel, first, *rest, **self.options | {"warmup": True}) is self
        Binary.launches += 1


@compiled
@pytest.mark.usefixtures("compile_for")
def test_prepared_launches_use_the_binary_that_triton_selects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For random dtypes, shapes, strides and alignments."""
    draw = random.Random(0).choice  # noqa: S311

    last_options: dict[str, Any] = {}

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        last_options.clear()
        last_options.update(options)
        return TRITON_RUN(kernel, *arguments, **options)

    def build(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> Binary:
        binary = kernel.device_caches[device][0][key] = Binary(kernel, dict(last_options))
        return binary

    def draw_tensor(shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """With a random offset and stride."""
        step = draw([1, 1, 2])
        start = draw([0, 0, 1, 4])
        storage = torch.zeros(2**10, dtype=draw(dtypes))[start : start + step * math.prod(shape)]
        return storage[::step].view(shape)

    def like(tensor: Any) -> Any:
        """Another tensor that the same plan serves."""
        if tensor is None:
            return None
        offset = tensor.storage_offset() + draw([0, 16])
        return tensor.new_zeros(2**10).as_strided(tensor.shape, tensor.stride(), offset)

    use_target(-90, 90)  # A device without cached binaries.
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(JITFunction, "_do_compile", build)
    monkeypatch.setattr(kernels, "LOCAL_DIVISOR_SAMPLES", 0)
    monkeypatch.setattr(Binary, "launches", 0)
    shapes = [(1, 1), (16, 1), (1, 16), (3, 5), (16, 4), (2, 5, 3), (1, 4, 16)]
    dtypes = (torch.float32, torch.float16)
    for _ in range(400):
        shape = draw(shapes)
        samples = (shape[0], *shape[2:])
        call = Call(
            "logits", draw([True, False]), 1, draw(["none", "sum", "mean"]), -100, torch.float32
        )
        target = (
            draw_tensor(samples, torch.int64, torch.uint8)
            if call.is_index
            else draw_tensor(shape, *dtypes)
        )
        weight, sample_weight = draw_tensor(shape[1:2], *dtypes), draw_tensor(samples, *dtypes)
        tensors = (
            draw_tensor(shape, *dtypes),
            target,
            draw([None, weight]),
            draw([None, sample_weight]),
        )
        plan = kernels.prepare(call, *tensors)
        for _ in range(8):
            input, target, weight, sample_weight = map(like, tensors)
            upstream = draw_tensor(samples if call.reduction == "none" else (), torch.float32)
            needs = (True, not call.is_index and draw([True, False]))
            plan.compute(
                input, target, weight, sample_weight, needs, draw([None, upstream]),
                draw([True, False]),
            )  # fmt: skip
            flat = tensor((2**31 - draw([0, 16]),), input.dtype)
            labels = draw_tensor(samples, target.dtype) if call.is_index else target
            plan.rescale([draw_tensor(shape, input.dtype), flat], upstream.view(-1)[:1], labels)
    assert Binary.launches > 3000


@compiled
def test_concurrent_launches_share_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, is_captured = 1, False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernels, "_workspaces", {})
    monkeypatch.setattr(kernels, "_graph_counters", {})
    monkeypatch.setattr(kernels, "GRAPH_COUNTERS", 2)

    def find(dtype: torch.dtype = torch.float32) -> Any:
        return kernels._find_workspaces(torch.device("cuda", 0), dtype).find(stream)

    with FakeTensorMode():
        is_captured = True
        found = [find()]  # Before counters for graphs exist.
        is_captured = False
        first = find()
        assert find() is first
        found += [first, find(torch.float64)]
        stream = 2
        found.append(find())
        assert find() is found[-1]
        is_captured = True
        found += [find() for _ in range(3)]
        counters = [counter for _, counter in found]
        assert [counter._is_view() for counter in counters] == [False] * 4 + [True, True, False]
        assert counters[4].storage_offset() != counters[5].storage_offset()
        for tensors in zip(*found, strict=True):
            assert len(set(map(id, tensors))) == len(found)


class Operations(TorchDispatchMode):
    """Records the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 10), (65_536, 10), (8, 21, 64, 64)], ids=str)
def test_forward_and_backward_are_two_launches_or_three(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__)
    )
    samples = (shape[0], *shape[2:])
    y, soft, index = tensor(shape, dtype), tensor(shape, dtype), tensor(samples, torch.int64)
    kernels._find_workspaces(y.device, torch.float32).find(None)
    for reduction in REDUCTIONS:
        for target, is_index in ((soft, False), (index, True)):
            for call in calls(reduction, is_index=is_index):
                for sample_weight in (None, tensor(samples, torch.float32)):
                    if sample_weight is not None and call.kind == "squares" and not is_index:
                        sample_weight = tensor((shape[0], 1, *shape[2:]), torch.float32)
                    launched.clear()
                    losses = () if reduction != "none" else samples
                    if reduction == "none" and call.kind == "squares":
                        losses = shape
                    upstream = tensor(losses, torch.float32)
                    is_late = reduction == "none" or dtype == torch.float16
                    arguments = (y, target, None, sample_weight)
                    with Operations() as operations:
                        if is_late:
                            run(call, *arguments, (False, False))
                            run(call, *arguments, (True, False), upstream)
                        else:
                            _, *grads = run(call, *arguments, (True, False))
                            rescale(grads, upstream, call, target)
                    sums_divisor = reduction == "mean" and (is_index or sample_weight is not None)
                    sums_divisor &= (
                        samples[0] * len(index[0].view(-1)) > kernels.LOCAL_DIVISOR_SAMPLES
                    )
                    assert len(launched) == 2 + sums_divisor, (call, launched)
                    # One gradient, and the loss: once per pass.
                    assert operations.names.count("empty_like") == 2 + is_late
                    assert set(operations.names) <= {
                        "empty_like", "view", "expand", "_unsafe_view", "detach"
                    }  # fmt: skip


@compiled
def test_without_a_compiler_or_gpu_the_formula_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    find = ops._load_triton.__wrapped__
    monkeypatch.setattr(kernels.Plan, "compute", lambda *arguments: arguments)
    assert find(torch.device("cpu")) is kernels
    no_compiler = mock.Mock(side_effect=RuntimeError("Failed to find C compiler"))
    monkeypatch.setattr(kernels.Plan, "compute", no_compiler)
    with pytest.warns(UserWarning, match="RuntimeError: Failed to find C compiler"):
        assert find(torch.device("cpu")) is None
    capability = (7, 5)
    assert find(torch.device("cpu")) is None
    capability = (9, 0)
    monkeypatch.setitem(sys.modules, "torchlosses.kernels.triton", None)
    monkeypatch.delattr("torchlosses.kernels.triton")
    assert find(torch.device("cpu")) is None
