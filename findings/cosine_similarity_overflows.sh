#!/usr/bin/env bash
# torch 2.13.0: parallel vectors have a cosine similarity of 1, whatever their length.
# From a length of 2e19 on, the squared norm overflows float32 and F.cosine_similarity is 0.0, with
# a gradient of 0 and no NaN. Hurts embeddings that grow: they silently stop learning.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
one = torch.ones(1, 2)
as_found = True
for length, expected in [(1e18, 1.0), (1e25, 0.0)]:
    x = torch.full((1, 2), length, requires_grad=True)
    value = F.cosine_similarity(x, one)
    (grad,) = torch.autograd.grad(value.sum(), x)
    print(f"entries of {length:g}: similarity {value.item():.6f}, gradient {grad[0].tolist()}")
    as_found &= abs(value.item() - expected) < 1e-5
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
