#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2: torch.onnx.export of F.cross_entropy should keep label_smoothing
# and targets that are probabilities. It drops label_smoothing silently and writes the hard loss,
# and for probabilities it writes an invalid model. Hurts models exported with their loss.
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
x = torch.tensor([[0.5, -1.0, 2.0]])
label = torch.tensor([2])
hard = F.cross_entropy(x, label)
smooth = F.cross_entropy(x, label, label_smoothing=0.5)
onnx, nodes = served(lambda x, t: F.cross_entropy(x, t, label_smoothing=0.5), x, label)
print("label_smoothing=0.5, eager:", smooth.item(), "ONNX Runtime:", onnx.item(), nodes)
print("label_smoothing=0.0, eager:", hard.item())
as_found = torch.allclose(onnx, hard) and (smooth - hard).abs() > 0.1

soft = torch.tensor([[0.5, 0.3, 0.2]])
print("probabilities, eager:", F.cross_entropy(x, soft).item())
try:
    print("probabilities, ONNX Runtime:", served(F.cross_entropy, x, soft)[0].item())
    as_found = False
except Exception as error:
    text = str(error)
    print("probabilities, ONNX Runtime:", type(error).__name__, text[text.find("Type Error") :])
    as_found &= "Type 'tensor(float)' of input parameter" in text
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
