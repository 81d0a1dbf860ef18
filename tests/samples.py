"""A list of named samples for each loss, shared by the tests of parity, gradients and transforms.

A sample holds NumPy arrays in float64, so it serves every dtype, device and implementation.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import torchlosses

Array = NDArray[Any]

REDUCTIONS = ("sum", "mean", "batchmean", "none")


@dataclass(frozen=True)
class Sample:
    """A call of a loss: its name in `torchlosses.functional`, input, target and options."""

    name: str
    loss: str
    input: Array
    target: Array
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(torchlosses.functional, self.loss)
        return function

    @property
    def is_index(self) -> bool:
        return self.target.shape != self.input.shape

    @property
    def is_per_element(self) -> bool:
        """Whether each element has a loss, not each sample."""
        return self.loss == "sum_squared_error"

    @property
    def axis(self) -> int:
        """The class dimension."""
        return _axis(self.input.shape, self.options.get("dim"))

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Fresh tensors: floating arrays in `dtype`, others in their own dtype."""

        def tensor(array: Array) -> Tensor:
            result = torch.tensor(array, device=device)
            return result.to(dtype) if result.is_floating_point() else result

        options = {
            name: tensor(value) if isinstance(value, np.ndarray) else value
            for name, value in self.options.items()
        }
        return tensor(self.input), tensor(self.target), options

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Array, Array]:
        """Value and gradient in float64, for arguments rounded to `dtype`."""
        input, target, options = self.tensors(dtype)
        return reference(self.loss, {"input": input, "target": target} | options)


def reference(loss: str, arguments: dict[str, Any]) -> tuple[Array, Array]:
    """Value and gradient by the NumPy reference in float64, for tensors of any dtype."""

    def to_numpy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()

    arguments = {name: to_numpy(value) for name, value in arguments.items()}
    value, grad = (
        getattr(torchlosses.reference, loss + suffix)(**arguments) for suffix in ("", "_grad")
    )
    return value, grad


# Shape and class dimension: by default, first, last, and second of four.
LAYOUTS: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((5,), None),
    ((4, 5), None),
    ((5, 4), 0),
    ((3, 4, 5), -1),
    ((2, 5, 3, 4), 1),
)
DEFAULT_LAYOUT = 1


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _softmax(x: Array, axis: int) -> Array:
    exponentials: Array = np.exp(x)
    total: Array = exponentials.sum(axis, keepdims=True)
    return exponentials / total


def _axis(shape: tuple[int, ...], dim: int | None) -> int:
    return min(1, len(shape) - 1) if dim is None else dim % len(shape)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _channels_first(rows: Array, index: Array) -> tuple[Array, Array]:
    """Rows and their classes, twice, in the layout (N, C, H): samples are contiguous."""
    return np.tile(rows.T, 2)[None], np.tile(index, 2)[None]


def _squared_errors() -> Iterator[Sample]:
    loss = "sum_squared_error"
    for shape in ((), (1,), (7,), (4, 5), (2, 3, 4, 5), (0, 5), (4, 0), (0,)):
        for reduction in REDUCTIONS:
            name = f"sse-dense-{shape}-{reduction}"
            rng = _rng(name)
            input, target = rng.normal(size=shape), rng.normal(size=shape)
            yield Sample(name, loss, input, target, {"reduction": reduction})
    rng = _rng(loss)
    input = rng.normal(size=(4, 5))
    for dtype in ("int8", "uint8", "int64", "bool"):
        target = (np.arange(5) == rng.integers(0, 5, (4, 1))).astype(dtype)
        yield Sample(f"sse-onehot-{dtype}", loss, input, target)
    for shape in ((), (1,), (5,), (4, 1), (4, 5)):
        for reduction in REDUCTIONS:
            options = {"sample_weight": rng.uniform(0, 2, shape), "reduction": reduction}
            name = f"sse-dense-sample_weight{shape}-{reduction}"
            yield Sample(name, loss, input, rng.normal(size=(4, 5)), options)
    for layout, dim in LAYOUTS:
        samples = _without(layout, _axis(layout, dim))
        for reduction in REDUCTIONS:
            name = f"sse-index-{layout}-dim={dim}-{reduction}"
            rng = _rng(name)
            options = {"reduction": reduction, "dim": dim}
            target = np.asarray(rng.integers(0, 5, samples))
            yield Sample(name, loss, rng.normal(size=layout), target, options)
            target = target.copy()
            target.flat[::2] = -100
            weight = {"sample_weight": rng.uniform(0, 2, samples)}
            input = rng.normal(size=layout)
            yield Sample(name + "-ignored", loss, input, target, options | weight)
    hard = np.array([[np.nan, 1.0, 2.0], [np.inf, 0.0, -np.inf], [1e15, -1e15, 1e-30]])
    yield Sample("sse-nan-and-inf", loss, hard, np.zeros((3, 3)), {"reduction": "none"})
    for reduction in REDUCTIONS:
        options = {"reduction": reduction}
        ignored = np.array([-100, -100, 2])
        yield Sample(f"sse-nan-ignored-{reduction}", loss, hard, ignored, options)
        name = f"sse-nan-ignored-channels-first-{reduction}"
        yield Sample(name, loss, *_channels_first(hard, ignored), options)
        ignored = np.full(3, -100)
        yield Sample(f"sse-all-ignored-{reduction}", loss, hard, ignored, options)
        no_classes = np.zeros((3, 0))
        yield Sample(f"sse-no-classes-index-{reduction}", loss, no_classes, ignored, options)
        empty = np.zeros(0, np.int64)
        yield Sample(f"sse-index-empty-{reduction}", loss, np.zeros((0, 3)), empty, options)


EXTRAS = ("plain", "exact", "weight", "smooth", "sample_weight", "all")


def _extras_and_reductions(layout: int) -> Iterator[tuple[str, str]]:
    """All pairs for the default layout; for others two in five, with every extra and reduction.

    The fuzz tests cover the remaining combinations.
    """
    for (e, extra), (r, reduction) in itertools.product(enumerate(EXTRAS), enumerate(REDUCTIONS)):
        if layout == DEFAULT_LAYOUT or (layout - e - r) % len(LAYOUTS) in (0, 2):
            yield extra, reduction


def _cross_entropies() -> Iterator[Sample]:
    for layout, (shape, dim) in enumerate(LAYOUTS):
        axis = _axis(shape, dim)
        samples = _without(shape, axis)
        for from_logits in (False, True):
            for is_index in (False, True):
                for extra, reduction in _extras_and_reductions(layout):
                    name = "-".join(
                        (
                            "ce",
                            "logits" if from_logits else "probabilities",
                            "index" if is_index else "soft",
                            f"{shape}-dim={dim}-{extra}-{reduction}",
                        )
                    )
                    rng = _rng(name)
                    options: dict[str, Any] = {"reduction": reduction, "dim": dim}
                    options["from_logits"] = from_logits
                    if extra == "exact":
                        options["delta"] = 0
                    if extra in ("weight", "all"):
                        options["weight"] = rng.uniform(0.1, 2, 5)
                    if extra in ("smooth", "all"):
                        options["label_smoothing"] = 0.1
                    if extra in ("sample_weight", "all"):
                        options["sample_weight"] = rng.uniform(0, 2, samples)
                    input = rng.normal(size=shape)
                    target = _softmax(rng.normal(size=shape), axis)
                    if is_index:
                        target = np.asarray(rng.integers(0, 5, samples))
                        if extra == "all":
                            options["ignore_index"] = 3
                    if not from_logits:
                        input = _softmax(input, axis)
                    yield Sample(name, "cross_entropy_error", input, target, options)
    yield from _hard_cross_entropies()


def _hard_cross_entropies() -> Iterator[Sample]:
    loss = "cross_entropy_error"
    inf = np.inf
    corners = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1e-30, 0.0, 1.0]])
    onehot = np.array([[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
    logits = np.array([[0.0, -inf, 5.0], [1e4, -1e4, 0.0], [-90.0, 0.0, 0.0], [-inf, 3.0, -inf]])
    soft = np.array([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    index = np.array([1, 1, 0, 2])
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        for delta in (1e-7, 0, 1e-2, 3):
            guarded = options | {"delta": delta}
            end = f"delta={delta}-{reduction}"
            yield Sample(f"ce-corners-onehot-{end}", loss, corners, onehot, guarded)
            yield Sample(f"ce-corners-index-{end}", loss, corners, index, guarded)
            guarded = guarded | {"from_logits": True}
            yield Sample(f"ce-hard-logits-soft-{end}", loss, logits, soft, guarded)
            yield Sample(
                f"ce-hard-logits-index-{end}", loss, logits, np.array([2, 0, 0, 1]), guarded
            )
        for from_logits in (False, True):
            common = options | {"from_logits": from_logits}
            end = f"from_logits={from_logits}-{reduction}"
            hard = np.array([[np.nan, 0.2, 0.3], [inf, 0.0, -inf], [0.3, 0.3, 0.4]])
            ignored = np.array([-100, -100, 1])
            yield Sample(f"ce-nan-ignored-{end}", loss, hard, ignored, common)
            name = f"ce-nan-ignored-channels-first-{end}"
            yield Sample(name, loss, *_channels_first(hard, ignored), common)
            yield Sample(f"ce-all-ignored-{end}", loss, hard, np.full(3, -100), common)
            yield Sample(f"ce-no-samples-index-{end}", loss, np.zeros((0, 3)), index[:0], common)
            yield Sample(
                f"ce-no-samples-soft-{end}", loss, np.zeros((0, 3)), np.zeros((0, 3)), common
            )
            yield Sample(
                f"ce-no-classes-soft-{end}", loss, np.zeros((2, 0)), np.zeros((2, 0)), common
            )
            yield Sample(
                f"ce-no-classes-index-{end}", loss, np.zeros((2, 0)), np.full(2, -100), common
            )
            weights = common | {"weight": np.zeros(0), "label_smoothing": 0.1}
            for name, classes in (("soft", np.zeros((2, 0))), ("index", np.full(2, -100))):
                name = f"ce-no-classes-weight-{name}-{end}"
                yield Sample(name, loss, np.zeros((2, 0)), classes, weights)
            yield Sample(f"ce-one-class-{end}", loss, np.ones((3, 1)), np.zeros(3, int), common)
            yield Sample(f"ce-scalar-{end}", loss, np.array(0.3), np.array(0.7), common)
    for dtype in ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"):
        yield Sample(f"ce-corners-index-{dtype}", loss, corners, index.astype(dtype))
    for dtype in ("bool", "int8", "int64"):
        yield Sample(f"ce-corners-onehot-{dtype}", loss, corners, onehot.astype(dtype))
    tiny = {"delta": 1e-300}  # 0 in float32, where 0·log 0 must still be 0.
    yield Sample("ce-corners-delta-of-1e-300", loss, onehot + 0.0, onehot, tiny)
    for kind, target in (("onehot", onehot), ("index", index)):
        negative = np.where(corners == 0, -0.0, corners)  # −0.0 + 0 is 0, and its slope −∞.
        yield Sample(f"ce-corners-negative-zero-{kind}", loss, negative, target, {"delta": 0})
        smoothed = {"delta": 0, "label_smoothing": 0.1}
        if kind == "index":
            smoothed["ignore_index"] = 0
        yield Sample(f"ce-smoothed-without-guard-{kind}", loss, soft + 0.1, target, smoothed)
    other_classes = np.array([[np.nan, 0.5, -0.0], [0.5, inf, 0.5]])
    labels, zero_weight = np.array([2, 0, 1, 1]), np.array([1.0, 0.0, 1.0])
    for delta in (1e-7, 0):  # Only the target's class counts: a NaN elsewhere does not, log 0 does.
        options = {"delta": delta, "reduction": "none"}
        name = f"ce-nan-in-other-classes-delta={delta}"
        yield Sample(name, loss, other_classes, np.array([1, 2]), options)
        options = options | {"weight": zero_weight}
        yield Sample(f"ce-corners-zero-class-weight-delta={delta}", loss, corners, labels, options)
    smooth = {"delta": 0, "label_smoothing": 1.0, "reduction": "none"}  # The class has weight 0.
    yield Sample("ce-corners-all-smooth", loss, corners, labels, smooth)
    odd = np.array([[0.1, -0.2, 2.0], [3.0, 0.2, 0.5]])
    yield Sample("ce-targets-not-a-distribution", loss, np.abs(odd), odd)
    yield Sample(
        "ce-corners-ignored-uint8", loss, corners, index.astype("uint8"), {"ignore_index": 1}
    )
    weights = {"sample_weight": np.array([True, False, True, True]), "reduction": "mean"}
    yield Sample("ce-corners-boolean-sample-weight", loss, corners, index, weights)
    images = np.stack((soft.T, soft.T)).copy() + 0.1
    weights = {"sample_weight": np.array([[0.5], [2.0]])}
    yield Sample("ce-sample-weight-of-an-image", loss, images, np.tile(index, (2, 1)), weights)
    zeros = {"sample_weight": np.zeros(4), "reduction": "mean"}
    yield Sample("ce-corners-all-weights-zero", loss, corners, index, zeros)


def _linear_cross_entropies() -> Iterator[Sample]:
    """Calls whose options include the layer's weight and bias."""
    for shape, is_index, extra, reduction in itertools.product(
        ((4,), (7, 4), (2, 3, 4)),
        (False, True),
        ("plain", "bias", "weight", "all"),
        REDUCTIONS,
    ):
        kind = "index" if is_index else "soft"
        name = f"linear-{kind}-{shape}-{extra}-{reduction}"
        rng = _rng(name)
        rows = shape[:-1]
        options: dict[str, Any] = {"linear_weight": rng.normal(size=(5, 4))}
        options["reduction"] = reduction
        if extra in ("bias", "all"):
            options["linear_bias"] = rng.normal(size=5)
        if extra in ("weight", "all"):
            options["weight"] = rng.uniform(0.1, 2, 5)
        if extra == "weight":
            options["delta"] = 0
        if extra == "all":
            options["label_smoothing"] = 0.1
            options["sample_weight"] = rng.uniform(0, 2, rows[-1:])
        target = _softmax(rng.normal(size=(*rows, 5)), len(rows))
        if is_index:
            target = np.asarray(rng.integers(0, 5, rows))
            if extra == "all":
                options["ignore_index"] = 3
        yield Sample(name, "linear_cross_entropy_error", rng.normal(size=shape), target, options)


SQUARED_ERRORS = list(_squared_errors())
CROSS_ENTROPIES = list(_cross_entropies())
SAMPLES = SQUARED_ERRORS + CROSS_ENTROPIES
LINEAR_CROSS_ENTROPIES = list(_linear_cross_entropies())  # Other arguments, so not in SAMPLES.
