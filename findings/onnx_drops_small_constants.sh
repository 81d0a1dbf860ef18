#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2: torch.onnx.export should keep "x + 1e-8" and "x * 1.000005".
# Its optimizer takes constants within 1e-8 of 0 (or near 1) for 0 (or 1) and deletes the operation:
# log(x + 1e-8) is -inf, x / (sum + 1e-12) NaN at 0. Hurts every epsilon; optimize=False keeps it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet \
    torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import contextlib
import io
import sys

import onnxruntime
import onnxscript
import torch
import torch.nn.functional as F


def served(function, *arrays):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    path = sys.argv[1] + "/model.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Module().eval(), arrays, dynamo=True, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: array.numpy() for name, array in zip(names, arrays, strict=True)}
    nodes = [node.op_type for node in program.model_proto.graph.node]
    return torch.as_tensor(session.run(None, feed)[0]), nodes


print("torch", torch.__version__, "onnxscript", onnxscript.__version__)
print("onnxruntime", onnxruntime.__version__)
zeros, ones = torch.zeros(2), torch.ones(2)
as_found = True
for name, function, x, expected in [
    ("log(x + 1e-8)", lambda x: torch.log(x + 1e-8), zeros, float("-inf")),
    ("log(x + 2e-8)", lambda x: torch.log(x + 2e-8), zeros, -17.72753),
    ("x / (sum(x) + 1e-12)", lambda x: x / (x.sum() + 1e-12), zeros, float("nan")),
    ("x * 1.000005", lambda x: x * 1.000005, ones, 1.0),
]:
    eager = function(x)
    onnx, nodes = served(function, x)
    print(name, "eager:", eager.tolist(), "ONNX Runtime:", onnx.tolist(), "nodes:", nodes)
    as_found &= bool(eager.isfinite().all())
    as_found &= torch.allclose(onnx, torch.full((2,), expected), rtol=1e-6, equal_nan=True)
as_found &= not torch.equal(ones * 1.000005, ones)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
