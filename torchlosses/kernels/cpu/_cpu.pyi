"""The extension module of `module.cpp`; there is none where no compiler was."""

LOSSES: tuple[str, ...]
REDUCTIONS: tuple[str, ...]
TORCH_NAMES: tuple[str, ...]
FRESH: int  # From so many bytes on, memory comes fresh from the system.

def prepare(
    kind: int,
    reduction: int,
    is_index: bool,
    is_double: bool,
    weighs_elements: bool,
    input_storage: int,
    target_storage: int,
    outer: int,
    classes: int,
    inner: int,
    batch: int,
    ignore_index: int,
    delta: float,
    smoothing: float,
    /,
) -> object: ...
def run(
    call: object,
    input: int,
    target: int,
    weight: int,
    sample_weight: int,
    upstream: int,
    losses: int,
    grad_input: int,
    grad_target: int,
    /,
) -> int: ...
def advise(address: int, size: int, /) -> None: ...
def connect(*addresses: int) -> bool: ...
def set_target(number: int, /) -> int: ...
def apply(is_log: bool, is_double: bool, input: int, output: int, number: int, /) -> None: ...
