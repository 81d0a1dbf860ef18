#!/usr/bin/env bash
# torch 2.13.0: weight= with reduction="mean" should divide alike in all losses. F.mse_loss and
# F.cross_entropy with labels divide by the sum of weights, F.binary_cross_entropy, and
# F.cross_entropy with the same labels one-hot, by the count. Hurts whoever swaps one for another.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
weight = torch.tensor([3.0, 5.0])
x, ones = torch.zeros(2), torch.ones(2)
logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
as_found = True
for name, weighted, plain, expected in [
    ("mse_loss", F.mse_loss(x, ones, weight=weight), F.mse_loss(x, ones), 1),
    ("l1_loss", F.l1_loss(x, ones, weight=weight), F.l1_loss(x, ones), 1),
    (
        "binary_cross_entropy_with_logits",
        F.binary_cross_entropy_with_logits(x, ones, weight=weight),
        F.binary_cross_entropy_with_logits(x, ones),
        4,
    ),
    (
        "cross_entropy, labels",
        F.cross_entropy(logits, labels, weight=weight),
        F.cross_entropy(logits, labels),
        1,
    ),
    (
        "cross_entropy, one-hot",
        F.cross_entropy(logits, F.one_hot(labels).float(), weight=weight),
        F.cross_entropy(logits, F.one_hot(labels).float()),
        4,
    ),
]:
    factor = (weighted / plain).item()
    print(f"{name}: weights of 3 and 5 scale the mean by {factor:.4f}")
    as_found &= abs(factor - expected) < 1e-5
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
