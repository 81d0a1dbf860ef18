"""The extension module of `cpu.cpp`; there is none where no compiler was."""

from torchlosses.formulas import Call

def compute(
    call: Call,
    shape: tuple[int, ...],
    is_double: bool,
    input: int,
    target: int,
    weight: int,
    sample_weight: int,
    weighs_elements: bool,
    upstream: int,
    has_upstreams: bool,
    loss: int,
    grad_input: int,
    grad_target: int,
    input_storage: int,
    target_storage: int,
    /,
) -> int | None: ...
def set_threads(address: int | None, /) -> None: ...
def set_target(number: int, /) -> int: ...
def apply(is_log: bool, is_double: bool, input: int, output: int, number: int, /) -> None: ...
