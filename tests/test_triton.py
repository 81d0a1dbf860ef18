"""The GPU's kernels without a GPU: in Triton's interpreter, and compiled ahead of time.

The interpreter must be on before Triton is imported, so its tests run in a process of their own:
`TRITON_INTERPRET=1 python -m pytest -W ignore::RuntimeWarning tests/test_triton.py`.
"""

import contextlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import SAMPLES, Sample
from test_fused import FORMS
from test_parity import assert_matches_reference
from torch import Tensor
from torch.torch_version import TorchVersion

from torchlosses import fused
from torchlosses.functional import cross_entropy_error

triton = pytest.importorskip("triton", reason="this build of torch has no Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from torchlosses.kernels import triton as kernels  # noqa: E402

IS_INTERPRETED = triton.knobs.runtime.interpret
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")


@compiled
def test_passes_in_the_interpreter() -> None:
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("this NumPy makes no loop bounds for the interpreter of this Triton")
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         # NumPy computes there, and warns where a kernel makes ∞ or NaN.
         "-W", "ignore::RuntimeWarning",
         # A launch takes some ms, and the check of a gradient by differences a thousand launches.
         "-k", "not formula and not gradcheck and not gradgradcheck and not torch.float16",
         *(here / f"test_{name}.py" for name in ("triton", "parity", "gradients", "fuzz"))],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) > 4 * len(SAMPLES)  # type: ignore[index]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a tile, and more tiles than programs."""
    for name, value in {"MAX_PROGRAMS": 2, "ONE_PROGRAM": 0, "SPATIAL_SAMPLES": 2,
                        "LEAST": 16, "PER_WARP": 8}.items():  # fmt: skip
        monkeypatch.setattr(kernels, name, value)
    for name in ("ELEMENTS", "ROWS", "ROWS_OF_CLASS"):
        monkeypatch.setattr(kernels, name, kernels.Tile(whole=8, part=16))


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_small_tiles_match_the_reference() -> None:
    for sample in SAMPLES:
        if sample.options.get("reduction") in ("sum", "none"):
            assert_matches_reference(sample, torch.float64, "cpu")


def by_target(sample: Sample) -> Tensor:
    input, target, options = sample.tensors(torch.float64)
    losses = sample.function(input, target.requires_grad_(), **options)
    (grad,) = torch.autograd.grad(losses.sum(), target)
    return grad


@interpreted
@pytest.mark.parametrize("tiles", ["usual", "small"])
def test_gradients_by_the_target(
    tiles: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference has none; where p is 0 those of the formula are as arbitrary as others."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    is_soft = re.compile("sse-dense|ce-[a-z]*-soft").match
    soft = [s for s in SAMPLES if is_soft(s.name) and s.options["reduction"] in ("mean", "none")]
    ours = list(map(by_target, soft))
    monkeypatch.setattr(fused, "KERNELS", {})
    for sample, grad in zip(soft, ours, strict=True):
        torch.testing.assert_close(grad, by_target(sample), msg=sample.name)


SHAPES: list[tuple[int, ...]] = [(2, 1023), (3, 1025), (2, 9001), (1030, 10), (2, 257, 67)]


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_index", [False, True])
def test_sizes_around_a_tile(shape: tuple[int, ...], dtype: torch.dtype, is_index: bool) -> None:
    y = torch.rand(shape).to(dtype)
    target = torch.rand(shape).to(dtype)
    if is_index:
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
    for loss, options in FORMS:
        ours, exact = (x.detach().clone().requires_grad_() for x in (y, y.double()))
        value = loss(ours, target, **options)
        value.backward()
        expected = loss(exact, target if is_index else target.double(), **options)
        expected.backward()
        torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=1e-6)
        assert ours.grad is not None
        assert exact.grad is not None
        rtol = 2**-7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_as_low_as_they_come(dtype: torch.dtype) -> None:
    x = torch.full((2, kernels.ROWS_OF_CLASS.whole + 9), torch.finfo(dtype).min, dtype=dtype)
    expected = x.new_tensor(float(x.shape[1])).log().expand(2)
    for target in (torch.tensor([0, x.shape[1] - 1]), torch.ones_like(x) / x.shape[1]):
        loss = cross_entropy_error(x, target, from_logits=True, delta=0, reduction="none")
        torch.testing.assert_close(loss, expected)
    x[:, ::2] = -torch.inf
    loss = cross_entropy_error(x, torch.tensor([1, 3]), from_logits=True, reduction="none")
    torch.testing.assert_close(loss, -(1 / x.isfinite().sum(1).to(dtype) + 1e-7).log())


CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (kernels.squared_error, {"is_index": True}),
    *(
        call
        for from_logits in (False, True)
        for form in ({"delta": 1e-7, "from_logits": from_logits},)
        for call in (
            (kernels.cross_entropy_of_class, form),
            (
                kernels.cross_entropy,
                form | {"is_index": True, "weight": None, "label_smoothing": 0.1},
            ),
        )
    ),
]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "far"), [(torch.int64, 2**62), (torch.uint64, 2**64 - 100), (torch.int8, 127)]
)
def test_a_class_out_of_range_is_not_read(dtype: torch.dtype, far: int) -> None:
    """On a device nobody looks at the classes before; an unsigned −100 is no `ignore_index`."""
    target = torch.tensor([[1], [far], [3], [0]], dtype=dtype)
    ignored = [False] * 4
    if dtype.is_signed:
        target, ignored = torch.cat([target, target.new_tensor([[-100]])]), [*ignored, True]
    for kernel, options in CALLS:
        loss, grad, _ = kernel(
            torch.rand(len(target), 3), target, ignore_index=-100, scale=None, divisor=1,
            dtype=torch.float32, is_sum=False, needs=(True, False), **options,
        )  # fmt: skip
        for values in (loss, grad):
            assert values.isnan().all(1).tolist()[:4] == [False, True, True, False]
            assert (values == 0).all(1).tolist() == ignored


@interpreted
def test_offsets_beyond_2_to_the_31() -> None:
    y = torch.from_numpy(np.zeros((3, 2**30), np.float16))  # The memory is there once touched.
    y[2, -1] = 0.5
    assert cross_entropy_error(y[2:], torch.tensor([2**30 - 1]), delta=0) == torch.tensor(2.0).log()
    loss = cross_entropy_error(y, torch.tensor([0, 0, 2**30 - 1]), delta=0.5, reduction="none")
    torch.testing.assert_close(loss, -torch.tensor([0.5, 0.5, 1.0]).log())


@interpreted
def test_rescale_reads_the_factor() -> None:
    gradient = torch.rand(5000).bfloat16()
    for factor in (torch.tensor(1.0), torch.tensor(0.5), torch.full((5000,), 0.25)):
        expected = gradient * factor
        assert kernels.rescale(gradient, factor) is gradient
        assert torch.equal(gradient, expected.bfloat16())
    assert torch.equal(kernels.rescale(gradient, torch.tensor(2.0).expand(5000)), 2 * expected)


@pytest.fixture
def binaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Any]]]:
    """Compiles what is launched from now on for a GPU of the given capability, and no more."""
    made: list[Any] = []
    launch = JITFunction.run

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        made.append((kernel.__name__, launch(kernel, *arguments, **options | {"warmup": True})))

    def start(capability: int) -> list[Any]:
        # Triton keeps what it compiled by device, so each capability is one.
        triton.runtime.driver.set_active(
            types.SimpleNamespace(
                get_current_device=lambda: capability,
                get_current_stream=lambda device=None: 0,
                get_current_target=lambda: GPUTarget("cuda", capability, 32),
            )
        )
        return made

    monkeypatch.setattr(JITFunction, "run", run)
    yield start
    with contextlib.suppress(RuntimeError):  # Without a GPU there is nothing to go back to.
        triton.runtime.driver.reset_active()


def launch_all(shape: tuple[int, ...], dtype: torch.dtype, *, has_all_options: bool) -> None:
    """Every kernel, on tensors without memory."""
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = compute_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    samples = (shape[0], 1, *shape[2:])
    y, soft, index = tensor(shape, dtype), tensor(shape, dtype), tensor(samples, torch.int64)
    options: dict[str, Any] = {
        "scale": tensor(samples) if has_all_options else None,
        "divisor": tensor(()) if has_all_options else 3,
        "is_sum": not has_all_options,
        "ignore_index": -100,
        "dtype": compute_dtype,
    }
    weight = tensor(shape[1:2]) if has_all_options else None
    dense: dict[str, Any] = options | {"is_index": False, "needs": (True, has_all_options)}
    of_class: dict[str, Any] = options | {"needs": (True, False)}
    kernels.squared_error(y, soft, **dense)
    kernels.squared_error(y, index, is_index=True, **of_class)
    for delta in (1e-7, 0):
        for from_logits in (False, True):
            form: dict[str, Any] = {"delta": delta, "from_logits": from_logits}
            kernels.cross_entropy_of_class(y, index, **form, **of_class)
            form["weight"] = weight
            kernels.cross_entropy(y, soft, label_smoothing=0.0, **form, **dense)
            kernels.cross_entropy(y, index, label_smoothing=0.1, is_index=True, **form, **of_class)
    kernels.rescale(y, tensor(()))


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(
    capability: int, binaries: Callable[[int], list[Any]], tmp_path: Path
) -> None:
    made = binaries(capability)
    # Rows of one tile and of several; few classes; and samples, not classes, side by side.
    for shape, dtype, has_all_options in (
        ((4096, 4096), torch.float32, True),
        ((4096, 32768), torch.float32, False),
        ((4096, 32768), torch.bfloat16, True),
        ((65536, 10), torch.float64, True),
        ((16, 21, 512 * 512), torch.bfloat16, False),
    ):
        launch_all(shape, dtype, has_all_options=has_all_options)
    launched = {f"_{name}_kernel" for name in ("elements", "class", "softmax", "softmax_of_class")}
    assert {name for name, _ in made} == launched | {"_rescale_kernel"}
    path = tmp_path / "kernel.cubin"
    for name, binary in {id(binary): (name, binary) for name, binary in made}.values():
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
        assert stack == 0, f"{name} spills at {registers} registers"


@compiled
def test_where_triton_cannot_build_the_formula_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def rescale(gradient: Tensor, grad_loss: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    find = fused._find_triton.__wrapped__
    monkeypatch.setattr(kernels, "rescale", lambda gradient, grad_loss: gradient)
    assert find(torch.device("cpu")) is kernels
    monkeypatch.setattr(kernels, "rescale", rescale)
    with pytest.warns(UserWarning, match="RuntimeError: Failed to find C compiler"):
        assert find(torch.device("cpu")) is None
    capability = (7, 5)
    assert find(torch.device("cpu")) is None
    capability = (9, 0)
    monkeypatch.setitem(sys.modules, "torchlosses.kernels.triton", None)
    monkeypatch.delattr("torchlosses.kernels.triton")
    assert find(torch.device("cpu")) is None
