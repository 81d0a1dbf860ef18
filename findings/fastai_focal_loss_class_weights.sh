#!/usr/bin/env bash
# fastai 2.8.12: FocalLoss(weight=w) should be w (1 - p)^gamma (-log p), 10 times as large with
# weights of 10. It computes p from the weighted loss, as p^w: 15 times here, 424 times at p = 0.9.
# Hurts class weights: they undo the focus on hard samples that gamma sets.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 fastai==2.8.12 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import fastai
import torch
import torch.nn.functional as F
from fastai.losses import FocalLoss

print("torch", torch.__version__, "fastai", fastai.__version__)
torch.manual_seed(0)
logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
weight = torch.full((3,), 10.0)
plain, weighted = FocalLoss(gamma=2.0), FocalLoss(gamma=2.0, weight=weight)
ratio = (weighted(logits, labels) / plain(logits, labels)).item()
print(f"weights of 10, random logits: {ratio:.2f} times the unweighted loss")
sure = torch.tensor([[0.9, 0.05, 0.05]]).log()
found = (weighted(sure, labels[:1]) / plain(sure, labels[:1])).item()
by_power = 10 * ((1 - 0.9**10) / (1 - 0.9)) ** 2
print(f"p = 0.9: {found:.1f} times; with p to the power of the weight: {by_power:.1f}")
cross_entropy = F.cross_entropy(logits, labels, reduction="none")
by_formula = ((1 - (-cross_entropy).exp()) ** 2 * cross_entropy).mean()
as_found = torch.allclose(by_formula, plain(logits, labels)) and ratio > 12
as_found &= abs(found / by_power - 1) < 1e-4
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
