#!/usr/bin/env bash
# torch 2.13.0: F.soft_margin_loss is log(1 + exp(-y x)): 200 at -200, with a gradient of -1.
# It computes exp itself, so in float32 it is inf with a NaN gradient from about -89 on (float16:
# -12). F.multilabel_soft_margin_loss, the same formula, is right. Hurts early training and float16.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)


def value_and_gradient(loss, target, x):
    x = torch.tensor([[x]], requires_grad=True)
    value = loss(x, torch.full((1, 1), target))
    return value.item(), torch.autograd.grad(value, x)[0].item()


found = [value_and_gradient(F.soft_margin_loss, 1.0, x) for x in (-80.0, -200.0)]
kin = value_and_gradient(F.multilabel_soft_margin_loss, 1.0, -200.0)
half = F.soft_margin_loss(torch.tensor([-12.0]).half(), torch.ones(1).half()).item()
print("soft_margin_loss at -80 and -200 (loss, gradient):", found)
print("multilabel_soft_margin_loss at -200:", kin)
print("soft_margin_loss in float16 at -12:", half)
as_found = str(found) == "[(80.0, -1.0), (inf, nan)]" and kin == (200.0, -1.0)
as_found &= half == float("inf")
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
