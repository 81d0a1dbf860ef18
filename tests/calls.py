"""Random calls of the losses: shapes, strides, dtypes, options, values and a derivative to check.

Hypothesis draws the shape and the options, so that a failing call shrinks. The numbers come from a
NumPy generator whose seed is part of the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from samples import REDUCTIONS, Array
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
TENSORS = ("input", "target", "weight", "sample_weight")
LAYOUTS = ("contiguous", "permuted", "sliced", "offset", "expanded")
# What to compute: backward more often, as training does. "changed": an argument changes in place
# before backward. "dependent": the target is computed from the input.
FIRST = ("backward", "backward", "backward", "no_grad", "grad", "jvp", "vmap", "changed")
SECOND = ("double_backward", "jvp_of_grad", "vjp_of_arguments", "dependent")
COMPILED = ("eager", "aot_eager")
# 0, 1, δ, subnormal numbers of some dtype, ∞ and NaN; the last three not for probabilities.
SPECIAL = (0.0, 1.0, -0.0, 1e-7, 1e-30, 1e-40, 1e-310, np.inf, np.nan, -np.inf, -1e4, 1e4)


@dataclass(frozen=True)
class Call:
    """A call of a loss, by its name in `torchlosses.functional`, and the derivative to check.

    `arrays` holds all arguments by name; those with an entry in `dtypes` are cast to it.
    `bad_position` is the position of an invalid class in the target.
    """

    loss: str
    arrays: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    layouts: dict[str, str]
    transform: str
    bad_position: tuple[int, ...] | None
    seed: int

    @property
    def axis(self) -> int:
        """The class dimension."""
        dim, rank = self.arrays["dim"], max(np.ndim(self.arrays["input"]), 1)
        return int(min(1, rank - 1) if dim is None else dim % rank)

    def arguments(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        return {
            name: with_layout(
                torch.tensor(value, dtype=self.dtypes.get(name)), self.layouts[name], rng
            )
            if isinstance(value, np.ndarray)
            else value
            for name, value in self.arrays.items()
        }


def with_layout(tensor: Tensor, layout: str, rng: np.random.Generator) -> Tensor:
    """The same values with other strides; "expanded" repeats the first index of a dimension."""
    if layout == "offset":
        return torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape)
    if tensor.dim() == 0:
        return tensor
    if layout == "permuted":
        order = [int(d) for d in rng.permutation(tensor.dim())]
        return tensor.permute(order).contiguous().permute([order.index(d) for d in sorted(order)])
    dim = int(rng.integers(tensor.dim()))
    if layout == "sliced":
        return tensor.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if layout == "expanded" and tensor.shape[dim]:
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


@st.composite
def calls(draw: st.DrawFn) -> Call:
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    def one_in(number: int) -> bool:
        return draw(st.integers(1, number)) == number

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    if shape and one_in(8):  # Wider than a vector register and than the smallest blocks.
        wide = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:wide], draw(st.integers(6, 300)), *shape[wide + 1 :])
    rank = max(len(shape), 1)
    axis = draw(st.integers(0, rank - 1))
    dim = one_of(axis, axis - rank, *[None] * (axis == min(1, rank - 1)))
    classes = shape[axis] if shape else 1
    samples = shape[:axis] + shape[axis + 1 :]

    is_cross_entropy = one_in(3) or one_in(2)
    is_index = classes > 0 and len(shape) > 0 and one_in(2)
    transform = one_of(*SECOND) if one_in(6) else one_of(*FIRST)
    is_smooth = transform in SECOND or one_in(2)  # Finite differences need a smooth loss.
    if one_in(400):
        transform = one_of(*COMPILED)
    arrays: dict[str, Any] = {"reduction": one_of(*REDUCTIONS), "dim": dim}
    ignore_index = one_of(-100, -1, 0, 2, 77)
    if is_index:
        arrays["ignore_index"] = ignore_index
    from_logits = is_cross_entropy and one_in(2)
    if is_cross_entropy:
        arrays["from_logits"] = from_logits
        arrays["delta"] = one_of(1e-7, 0, 0.1, 3, 1e-30)
        arrays["label_smoothing"] = one_of(0.0, 0.1, 1.0)

    # With special values beyond the seventh a whole row may be NaN, which tests little.
    special = SPECIAL[: one_of(7, 12 if from_logits or not is_cross_entropy else 9)]
    share = 0 if is_smooth else one_of(0, 0.1, 0.6)

    def with_special_values(values: Array, special: Sequence[float]) -> Array:
        return np.where(rng.random(shape) < share, rng.choice(special, shape), values)

    input = rng.uniform(0.05, 1, shape)
    if from_logits or not is_cross_entropy:
        input = rng.normal(size=shape) * (1 if is_smooth else one_of(1, 30, 1e4))
    arrays["input"] = np.asarray(with_special_values(input, special))

    bad_position = None
    if is_index:
        target = np.asarray(rng.integers(0, classes, samples))
        target = np.where(rng.random(samples) < one_of(0, 0.3, 1), ignore_index, target)
        if target.size and one_in(16):
            bad_position = tuple(int(rng.integers(size)) for size in samples)
            target[bad_position] = classes if classes != ignore_index else classes + 1
        low, high = target.min(initial=0), target.max(initial=0)
        wide_enough = [k for k in INTEGERS if np.iinfo(k).min <= low and high <= np.iinfo(k).max]
        target = target.astype(one_of(*wide_enough))
    elif one_in(2):
        target = np.asarray(rng.random(shape))
        target = with_special_values(target, SPECIAL[:7]) if one_in(2) else target
    else:
        target = np.asarray(rng.integers(0, 2, shape)).astype(one_of(*INTEGERS, "bool"))
    arrays["target"] = target

    def weights(shape: tuple[int, ...]) -> Array:
        share = 0 if is_smooth else one_of(0, 0.5, 1)
        values = rng.uniform(0.1, 2, shape)
        is_special = rng.random(shape) < share
        return np.asarray(np.where(is_special, rng.choice([0.0, 1.0], shape), values))

    if one_in(2):
        full = samples if is_cross_entropy or is_index else shape
        cut = full[draw(st.integers(0, len(full))) :]
        arrays["sample_weight"] = weights(tuple(1 if one_in(2) else size for size in cut))
    if is_cross_entropy and shape and one_in(2):
        arrays["weight"] = weights((classes,))

    floating = [name for name in TENSORS if getattr(arrays.get(name), "dtype", None) == np.float64]
    dtypes = dict.fromkeys(floating, one_of(*FLOATING))
    if one_in(3):
        dtypes = {name: one_of(*FLOATING) for name in floating}
    if transform in SECOND:
        dtypes = dict.fromkeys(floating, torch.float64)
    layouts = dict.fromkeys(TENSORS, "contiguous")
    if one_in(2):
        layouts = {name: one_of(*LAYOUTS) for name in TENSORS}
    if bad_position is not None and layouts["target"] == "expanded":  # One bad class only.
        layouts["target"] = "sliced"
    loss = "cross_entropy_error" if is_cross_entropy else "sum_squared_error"
    return Call(loss, arrays, dtypes, layouts, transform, bad_position, seed)
