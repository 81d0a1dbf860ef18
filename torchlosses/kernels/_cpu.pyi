"""The extension module of `cpu.cpp`. Tensors come as addresses."""

from torch import Size

from torchlosses.formulas import Call

def compute(
    call: Call,
    shape: Size,
    is_double: bool,
    input: int,
    target: int,
    weight: int,
    sample_weight: int,
    weighs_elements: int,
    upstream: int,
    has_upstreams: int,
    loss: int,
    grad_input: int,
    grad_target: int,
    input_storage: int,
    target_storage: int,
    /,
) -> int | None:
    """Writes loss and gradients, and returns the flat position of the first bad class, if any."""

def set_threads(function: int | None, /) -> None: ...
def set_target(number: int, /) -> int: ...
def apply(operation: int, is_double: bool, values: int, results: int, size: int, /) -> None: ...
