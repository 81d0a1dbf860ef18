"""The CPU kernels themselves: arithmetic, determinism, memory, symbols and build.

Their losses and gradients are tested with those of the package. To run them under sanitizers:

    FLAGS="-std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
    g++ $FLAGS -fsanitize=address,undefined -shared -fPIC $(python3-config --includes) \
        torchlosses/kernels/cpu/module.cpp -o torchlosses/kernels/cpu/_cpu.abi3.so
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 FUZZ_CASES=10000 python -m pytest -m "fuzz or not fuzz" \
        tests/test_kernels.py tests/test_values.py tests/test_fuzz.py
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchlosses import formulas
from torchlosses.formulas import Arguments, Call, Result
from torchlosses.functional import sum_squared_error

cpu: Any = pytest.importorskip(
    "torchlosses.kernels.cpu", reason="no compiled CPU kernels", exc_type=ImportError
)
_cpu = cpu._cpu

ROOT = Path(__file__).parents[1]
Array = NDArray[Any]

# Symbols of Python's stable ABI, in 3.11 and later.
STABLE = {
    "PyBool_FromLong", "PyCapsule_GetPointer", "PyCapsule_New", "PyErr_Format", "PyErr_NoMemory",
    "PyErr_Occurred", "PyEval_RestoreThread", "PyEval_SaveThread", "PyExc_TypeError",
    "PyLong_AsLong", "PyLong_AsLongLong", "PyLong_AsSize_t", "PyLong_AsVoidPtr", "PyLong_FromLong",
    "PyLong_FromLongLong", "PyModule_AddIntConstant", "PyModule_AddObjectRef", "PyModule_Create2",
    "PyTuple_New", "PyTuple_SetItem", "PyUnicode_FromString", "_PyArg_ParseTuple_SizeT",
    "_Py_Dealloc", "_Py_NoneStruct",
}  # fmt: skip


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def _target(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set that the processor has."""
    if _cpu.set_target(request.param) != request.param:
        pytest.skip("this processor lacks these instructions")
    yield
    _cpu.set_target(2)


def apply(is_log: bool, x: Array) -> Array:
    result = np.empty_like(x)
    _cpu.apply(is_log, x.dtype == np.float64, x.ctypes.data, result.ctypes.data, x.size)
    return result


def check_ulps(result: Array, exact: Array) -> None:
    least = np.finfo(result.dtype).smallest_subnormal
    ulp = np.maximum(np.spacing(np.abs(exact).astype(result.dtype)), least)
    assert np.max(np.abs(result - exact) / ulp) <= 2


def positive(dtype: Any, number: int) -> Array:
    """Numbers of all exponents, including subnormal numbers, and many around 1."""
    end = np.array(np.inf, dtype).view(f"u{dtype().itemsize}")
    bits = np.arange(1, int(end), int(end) // number, dtype=end.dtype)
    return np.concatenate((bits.view(dtype), np.linspace(0.4, 2.5, number, dtype=dtype)))


@pytest.mark.usefixtures("_target")
@pytest.mark.parametrize(
    ("dtype", "wide", "lowest"), [(np.float32, np.float64, -104), (np.float64, np.longdouble, -746)]
)
def test_exponential_and_logarithm(dtype: Any, wide: Any, lowest: float) -> None:
    x = positive(dtype, 500_000)
    check_ulps(apply(True, x), np.log(x.astype(wide)))
    with np.errstate(invalid="ignore"):  # NumPy may warn of subnormal numbers.
        x = -np.concatenate((x[x < -lowest], np.linspace(0, -lowest, 500_000, dtype=dtype)))
    check_ulps(apply(False, x), np.exp(x.astype(wide)))
    inf, nan, tiny = np.inf, np.nan, np.finfo(dtype).smallest_subnormal
    logarithm = apply(True, np.array([0, -0.0, 1, inf, -inf, -1, -tiny, nan], dtype))
    np.testing.assert_array_equal(logarithm, [-inf, -inf, 0, inf, nan, nan, nan, nan])
    exponential = apply(False, np.array([0, -0.0, -tiny, -inf, 2 * lowest, nan], dtype))
    np.testing.assert_array_equal(exponential, [1, 1, 1, 0, 0, nan])


def compute(call: Call, input: Tensor, target: Tensor, *rest: Any) -> Result:
    plan = cpu.prepare(call, input, target, *rest[:2])
    result: Result = plan.compute(input, target, *rest)
    return result


def squares(input: Tensor, target: Tensor, needs: tuple[bool, bool]) -> Result:
    call = Call("squares", False, input.dim() - 1, "none", -100, torch.float32)
    return compute(call, input, target, None, None, needs)


@pytest.mark.usefixtures("_target")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_of_half_precision(dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    _, grad_input, grad_target = squares(numbers, torch.zeros(2**16), (True, True))
    assert grad_target is not None
    torch.testing.assert_close(grad_input, numbers, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(-grad_target, numbers.float(), rtol=0, atol=0, equal_nan=True)
    # Rounding of float32 numbers between two neighbours, at and beside the ties.
    bits = torch.arange(-(2**31), 2**31, 2**12, dtype=torch.int64)
    bits = torch.cat([bits + offset for offset in (-1, 0, 1)])[1:].to(torch.int32)
    number = bits.view(torch.float32)
    _, rounded, _ = squares(torch.zeros(len(number), dtype=dtype), -number, (True, False))
    torch.testing.assert_close(rounded, number.to(dtype), rtol=0, atol=0, equal_nan=True)


def arguments(call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64)
    samples = shape[: call.dim] + shape[call.dim + 1 :]
    target = torch.randn(shape, dtype=torch.float64).softmax(call.dim).to(dtype)
    if call.is_index:
        target = torch.randint(shape[call.dim], samples)
    return (x.softmax(call.dim) if call.kind == "probabilities" else x).to(dtype), target


KINDS = [(kind, is_index) for kind in ("squares", "probabilities", "logits") for is_index in (0, 1)]


@pytest.mark.usefixtures("_target")
@pytest.mark.parametrize(("kind", "is_index"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sizes_around_vectors_tiles_and_segments(
    kind: str, is_index: int, dtype: torch.dtype
) -> None:
    compute_dtype = torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(compute_dtype).eps
    rows = [
        (n, c)
        for c in (*range(1, 18), 31, 32, 33, 47, 1023, 1024, 1033, 1041, 2100)
        for n in (1, 65)
    ]
    images = [(2, c, n) for c in (1, 3, 30, 600) for n in (2, 15, 16, 17, 255, 257, 300)]
    wide = [(1, n) for n in (4095, 4096, 4103, 8191, 8193, 16385, 33000)]
    for shape in [*rows, *images, *wide, (1, 40000), (3, 9000, 2), (1, 2000, 20), (700, 25)]:
        call = Call(kind, bool(is_index), 1, "sum", -100, compute_dtype, 1e-7, 0.1)
        input, target = arguments(call, shape, dtype)
        value, grad_input, _ = compute(call, input, target, None, None, (True, not is_index))
        leaf = input.double().requires_grad_()
        exact = call._replace(dtype=torch.float64)
        loss = formulas.compute(exact, Arguments(leaf, target))
        (expected,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(
            value.double(), loss.detach(), rtol=16 * eps, atol=eps * input.numel()
        )
        assert grad_input is not None
        rounding = torch.finfo(dtype).eps + 64 * eps
        torch.testing.assert_close(grad_input.double(), expected, rtol=rounding, atol=64 * eps)


@pytest.mark.usefixtures("_target")
@pytest.mark.parametrize(("kind", "is_index"), KINDS)
def test_few_contiguous_samples_are_computed_as_strided_rows(kind: str, is_index: int) -> None:
    """With many classes, and in the remainder that fills no vector."""
    for shape in ((2, 40, 19), (2, 600, 3), (1, 1100, 17)):
        call = Call(kind, bool(is_index), 1, "none", 3, torch.float64, 1e-7)
        input, target = arguments(call, shape, torch.float64)
        leaves = [input.requires_grad_(), target]
        if not is_index:
            leaves[1].requires_grad_()
        weight, needs = torch.rand(shape[0], *shape[2:], dtype=torch.float64), (True, not is_index)
        weight = weight.unsqueeze(1) if kind == "squares" and not is_index else weight
        expected = formulas.compute(call, Arguments(input, target, None, weight))
        upstream = torch.rand_like(expected)
        slopes = torch.autograd.grad(expected, leaves[: 1 + (not is_index)], upstream)
        values = (input.detach(), target.detach(), None, weight)
        loss, *found = compute(call, *values, needs, upstream)
        torch.testing.assert_close((loss, *found[: len(slopes)]), (expected.detach(), *slopes))
        half, other = values[0].bfloat16(), values[1] if is_index else values[1].bfloat16()
        call = call._replace(dtype=torch.float32)
        loss, *found = compute(call, half, other, None, weight, needs, upstream)
        values = (half.double(), other if is_index else other.double(), None, weight)
        exact = compute(call._replace(dtype=torch.float64), *values, needs, upstream)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-5)
        for grad, exact_grad in zip(found, exact[1:], strict=True):
            if grad is not None and exact_grad is not None:
                torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("kind", "is_index"), KINDS)
@pytest.mark.parametrize("shape", [(3000, 10), (300, 1000), (2, 21, 90, 90)])
def test_results_do_not_depend_on_the_number_of_threads(
    kind: str, is_index: int, shape: tuple[int, ...]
) -> None:
    call = Call(kind, bool(is_index), 1, "mean", 3, torch.float32, 1e-7, 0.0)
    input, target = arguments(call, shape, torch.float32)
    samples = torch.rand(shape[:1] + shape[2:])
    if kind == "squares" and not is_index:
        samples = samples.unsqueeze(1)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3, 2):
        torch.set_num_threads(number)
        results.append(compute(call, input, target, None, samples, (True, False)))
    torch.set_num_threads(threads)
    first = results[0]
    for loss, grad_input, _ in results[1:]:
        assert grad_input is not None
        assert torch.equal(loss, first[0])
        torch.testing.assert_close(grad_input, first[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint64])
def test_a_large_unsigned_label_is_not_a_negative_ignore_index(dtype: torch.dtype) -> None:
    call = Call("logits", True, 1, "sum", -1, torch.float32, 1e-7)
    target = torch.tensor([0, 1, -1]).to(dtype)
    with pytest.raises(IndexError, match=rf"got class {target[2].item()} at position \(2,\)"):
        compute(call, torch.rand(3, 2), target, None, None, (False, False))


def test_a_label_beyond_2_to_the_31() -> None:
    size = 2**31 + 64  # Only one entry is touched, so the system provides one page of memory.
    input = torch.empty(1, size, dtype=torch.bfloat16)
    input[0, -1] = 0.5
    call = Call("probabilities", True, 1, "sum", -100, torch.float32)
    loss, *_ = compute(call, input, torch.tensor([size - 1]), None, None, (False, False))
    assert loss.item() == pytest.approx(np.log(2))


def resident_bytes(name: str) -> int:
    """Resident memory of this process: `VmRSS` is the current, `VmHWM` the peak size."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(("kind", "is_index"), KINDS)
def test_forward_allocates_at_most_1_mb(kind: str, is_index: int) -> None:
    call = Call(kind, bool(is_index), 1, "sum", -100, torch.float32, 1e-7)
    for shape in ((50, 100_000), (4, 21, 200, 300)):
        input, target = arguments(call, shape, torch.bfloat16)
        compute(call, input, target, None, None, (False, False))
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        compute(call, input, target, None, None, (False, False))
        assert resident_bytes("VmHWM") - before < 2**20


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm to read the symbols")
@pytest.mark.skipif(sys.platform != "linux", reason="needs the library names of Linux")
def test_the_extension_links_to_python_and_the_c_library_only() -> None:
    path = _cpu.__file__
    assert path.endswith(".abi3.so")
    output = subprocess.check_output(["nm", "-D", "--undefined-only", path], text=True)  # noqa: S607
    names = {line.split()[-1].split("@")[0] for line in output.splitlines() if " U " in line}
    assert {name for name in names if name.startswith(("Py", "_Py"))} <= STABLE
    libraries = [ctypes.CDLL("libc.so.6"), ctypes.CDLL("libm.so.6")]
    others = {name for name in names if not name.startswith(("Py", "_Py"))}
    assert {n for n in others if not any(hasattr(library, n) for library in libraries)} == set()


def test_more_elements_than_the_smallest_segments_hold() -> None:
    size = 2**25 + 2**15
    y, t = torch.ones(size, dtype=torch.float16), torch.zeros(size, dtype=torch.bool)
    assert sum_squared_error(y, t) == size / 2


TRAINING = """
import torch, warnings, torchlosses
assert torchlosses.__file__.startswith({folder!r}), torchlosses.__file__
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
x, target = torch.rand(8, 4), torch.arange(8) % 3
losses = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(20):
        optimizer.zero_grad()
        loss = torchlosses.CrossEntropyError(from_logits=True)(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
assert losses[-1] < losses[0]
print(len([w for w in caught if "torchlosses" in str(w.message)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="builds the package")
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """In a new environment the package installs, and losses train by their formulas with a warning.

    Nothing is downloaded: the dependencies are those of the environment that runs the tests.
    """
    source, folder = tmp_path / "source", tmp_path / "environment"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "torchlosses", source / "torchlosses", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    builder = venv.EnvBuilder()
    builder.create(folder)
    python = builder.ensure_directories(folder).env_exe
    base = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "-q"]
    environment = os.environ | {"CC": "false", "CXX": "false"}
    install = [*pip, "install", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run(install, env=environment, check=True)
    (wheel,) = packages.glob("torchlosses_guarded-*.dist-info/WHEEL")
    assert "Tag: cp311-abi3-" in wheel.read_text()
    assert not list(packages.rglob("*.so"))
    script = TRAINING.format(folder=str(folder))
    output = subprocess.check_output([python, "-c", script], text=True, cwd=tmp_path)
    assert output.split() == ["1"]
