#!/usr/bin/env bash
# torchmetrics 1.9.0: rank metrics and the hinge loss should not apply a sigmoid to scores.
# Scores outside [0, 1] get a float32 sigmoid first: large logits tie at 1.0, so a perfect AUROC of
# logits is 0.5, and the hinge loss of right answers is 0.37 instead of 0. Hurts raw model outputs.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torchmetrics
from torchmetrics.functional import auroc, average_precision, hinge_loss

print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
labels = torch.tensor([0, 0, 1, 1])
logits = torch.tensor([20.0, 30.0, 40.0, 50.0])
as_found = True
for metric in (auroc, average_precision):
    low, high = (metric(x, labels, task="binary").item() for x in (logits / 100, logits))
    print(metric.__name__, "of 0.2, 0.3, 0.4, 0.5:", low, "of 20, 30, 40, 50:", high)
    as_found &= low == 1.0 and high == 0.5
right = torch.tensor([2.0, 8.0, -6.0])
hinge = hinge_loss(right, torch.tensor([1, 1, 0]), task="binary").item()
wanted = (1 - torch.tensor([1.0, 1.0, -1.0]) * right).clamp(min=0).mean().item()
print("hinge_loss of 2, 8, -6 for 1, 1, 0:", hinge, "by its formula:", wanted)
as_found &= wanted == 0.0 and hinge > 0.3
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
