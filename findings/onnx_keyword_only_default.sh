#!/usr/bin/env bash
# torch 2.13.0: torch.onnx.export(module, (y, t), dynamo=False) should leave a keyword-only argument
# of forward at its default, as torch.jit.trace and dynamo=True do.
# It passes the default by position: "takes 3 positional arguments but 4 were given".
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import contextlib
import io
import warnings

import torch

warnings.simplefilter("ignore")
print("torch", torch.__version__)


class Loss(torch.nn.Module):
    def forward(self, y, t, *, beta=1.0):
        return torch.nn.functional.smooth_l1_loss(y, t, beta=beta)


y, t = torch.tensor([0.0, 3.0]), torch.zeros(2)
traced = torch.jit.trace(Loss(), (y, t))
print("eager:", Loss()(y, t).item(), "torch.jit.trace:", traced(y, t).item())
with contextlib.redirect_stdout(io.StringIO()):
    torch.onnx.export(Loss(), (y, t), dynamo=True, verbose=False)
print("dynamo=True: exported")
try:
    torch.onnx.export(Loss(), (y, t), io.BytesIO(), dynamo=False)
    message = "exported"
except TypeError as error:
    message = str(error)
print("dynamo=False:", message)
as_found = "takes 3 positional arguments but 4 were given" in message
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
