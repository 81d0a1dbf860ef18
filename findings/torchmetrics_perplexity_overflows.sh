#!/usr/bin/env bash
# torchmetrics 1.9.0: Perplexity should be exp of the cross-entropy of the logits.
# It computes the softmax and then its logarithm: one token of probability below 1e-45 (a gap of 104
# between logits) makes it inf for the whole data set. Hurts confident models: one token suffices.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F
import torchmetrics
from torchmetrics.text import Perplexity

print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
as_found = True
for gap in (80.0, 120.0):
    logits, labels = torch.zeros(1, 100, 4), torch.ones(1, 100, dtype=torch.long)
    logits[0, 0, 0] = gap  # one token of a hundred
    metric = Perplexity()
    metric.update(logits, labels)
    found = metric.compute().item()
    wanted = F.cross_entropy(logits[0], labels[0]).exp().item()
    print(f"a gap of {gap:g}: Perplexity {found:.4f}, exp of the cross-entropy {wanted:.4f}")
    as_found &= abs(found / wanted - 1) < 1e-4 if gap == 80 else found == float("inf")
    as_found &= wanted < 20
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
