#!/usr/bin/env bash
# torch 2.13.0: a row with the target ignore_index should have gradient 0 in F.cross_entropy.
# If the row's logits are all -inf (a fully masked position), the loss is finite and the row's
# gradient NaN, which the layers below spread. Hurts masked sequence models that pad with -100.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
inf = float("inf")
x = torch.tensor([[-inf, -inf], [0.0, 0.0]], requires_grad=True)
loss = F.cross_entropy(x, torch.tensor([-100, 0]))
(grad,) = torch.autograd.grad(loss, x)
print("loss:", loss.item())
print("gradient of the ignored row:", grad[0].tolist(), "of the other row:", grad[1].tolist())
as_found = bool(loss.isfinite() and grad[0].isnan().all()) and grad[1].tolist() == [-0.5, 0.5]
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
