"""The extension module of `module.cpp`; there is none where no compiler was."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from torchlosses.formulas import Call, Result

def compute(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    needs: tuple[bool, bool],
    upstream: Tensor | None = None,
    over_input: bool = False,
    complains: bool = True,
    /,
) -> Result: ...
def empty(like: Tensor, size: int, /) -> Tensor: ...
def find_key(
    form: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    /,
) -> tuple[Any, ...] | None: ...
def rescale(
    gradients: Sequence[Tensor | None], grad_loss: Tensor, /, *rest: Any
) -> Sequence[Tensor | None] | None: ...
def serve(
    known: dict[tuple[Any, ...], Any],
    kernels: Any,
    apply: Callable[..., Tensor],
    form: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    /,
) -> Tensor | None: ...
def set_up(
    parallel_for: int | None,
    dtypes: tuple[Any, ...],
    scalars: tuple[Tensor, ...],
    empty_like: Callable[..., Tensor],
    expand: Callable[..., Any],
    complain: Callable[..., None],
    plain: tuple[type[Tensor], type[Tensor]],
    detectors: tuple[Callable[[], Any], ...],
    is_grad_enabled: Callable[[], bool],
    forward_ad: ModuleType,
    /,
) -> None: ...
def set_target(number: int, /) -> int: ...
def apply(is_log: bool, is_double: bool, input: int, output: int, number: int, /) -> None: ...
