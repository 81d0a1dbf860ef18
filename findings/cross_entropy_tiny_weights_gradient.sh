#!/usr/bin/env bash
# torch 2.13.0: equal class weights of any size should cancel in the mean of F.cross_entropy.
# With weights of 5e-40 (float32 subnormals) the loss is right, but its gradient is inf and NaN.
# Hurts class weights that are products of frequencies: the loss looks right, the model turns NaN.
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
x = torch.randn(4, 5, requires_grad=True)
t = torch.tensor([0, 1, 2, 3])
plain = F.cross_entropy(x, t)
tiny = F.cross_entropy(x, t, weight=torch.full((5,), 5e-40))
(wanted,) = torch.autograd.grad(plain, x)
(found,) = torch.autograd.grad(tiny, x)
print("loss without weights:", plain.item(), "with weights of 5e-40:", tiny.item())
print("gradient without weights:", wanted[0].tolist())
print("gradient with weights:", found[0].tolist())
as_found = torch.allclose(plain, tiny, rtol=1e-4) and not found.isfinite().any()
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
