#!/usr/bin/env bash
# torch 2.13.0, CPU: the float16 mean of F.cross_entropy should be a mean, about 1.7 here.
# The sum and the count of pixels are float16 too: a map of 256 x 256 gives inf / inf = NaN and a
# smaller one inf. F.mse_loss is right. Hurts half-precision segmentation on the CPU.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(1, 4, 256, 256).half()
t = torch.randint(0, 4, (1, 256, 256))
whole, part = F.cross_entropy(x, t), F.cross_entropy(x[:, :, :200], t[:, :200])
print("float16, 256 x 256:", whole.item(), "200 x 256:", part.item())
print("float32, 256 x 256:", F.cross_entropy(x.float(), t).item())
square = F.mse_loss(x, torch.zeros_like(x))
print("mse_loss, float16:", square.item())
as_found = bool(whole.isnan() and part.isposinf() and square.isfinite())
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
