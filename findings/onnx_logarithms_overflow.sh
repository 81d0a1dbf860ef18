#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2: exported logaddexp, logsigmoid, logcumsumexp and
# binary_cross_entropy_with_logits should stay stable. They become Log(Exp + Exp), Log(Sigmoid) and
# Log(CumSum(Exp)): infinite from values or gaps of about 100 on. Hurts served log-likelihoods.
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
inf = float("inf")
a, b = torch.tensor([-200.0, 100.0]), torch.tensor([-180.0, 90.0])
as_found = True
for name, function, arrays, expected in [
    ("logaddexp", torch.logaddexp, (a, b), [-inf, inf]),
    ("logsigmoid", F.logsigmoid, (a,), [-inf, 0.0]),
    ("logcumsumexp", lambda a: torch.logcumsumexp(a, 0), (a,), [-inf, 100.0]),
    (
        "binary_cross_entropy_with_logits",
        lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="none"),
        (a, torch.ones(2)),
        [inf, 0.0],
    ),
]:
    eager = function(*arrays)
    onnx, nodes = served(function, *arrays)
    print(name, "eager:", eager.tolist(), "ONNX Runtime:", onnx.tolist(), "nodes:", nodes)
    as_found &= bool(eager.isfinite().all()) and onnx.tolist() == expected
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
