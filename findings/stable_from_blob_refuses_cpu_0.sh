#!/usr/bin/env bash
# torch 2.14.1: torch_from_blob of the stable C interface should take device index 0 for the CPU, as
# aoti_torch_empty_strided does. It fails: memory from elsewhere counts as "cpu", which is not
# "cpu:0". An extension must pass -1, whatever its tensors say of their own index.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1
"$tmp/venv/bin/python" - <<'EOF'
import ctypes
from pathlib import Path

import torch

print("torch", torch.__version__)
library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
library.torch_exception_get_what_without_backtrace.restype = ctypes.c_char_p
uint8, cpu = library.aoti_torch_dtype_uint8(), library.aoti_torch_device_type_cpu()
one = (ctypes.c_int64 * 1)(1)
delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda data, context: None)
byte = ctypes.create_string_buffer(1)
result = ctypes.c_void_p()


def empty(index):
    return library.aoti_torch_empty_strided(
        ctypes.c_int64(1), one, one, uint8, cpu, index, ctypes.byref(result)
    )


def from_blob(index):
    return library.torch_from_blob(
        byte, ctypes.c_int64(1), one, one, ctypes.c_int64(0), uint8, cpu, index,
        ctypes.byref(result), library.aoti_torch_layout_strided(), None, ctypes.c_int64(0),
        delete, None,
    )


errors = {f.__name__: [f(0), f(-1)] for f in (empty, from_blob)}
print("errors with index 0 and -1:", errors)
from_blob(0)
message = library.torch_exception_get_what_without_backtrace().decode()
print(message)
as_found = errors == {"empty": [0, 0], "from_blob": [1, 0]} and "cpu:0 does not match" in message
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
