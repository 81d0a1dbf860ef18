#!/usr/bin/env bash
# torch 2.13.0, CPU: a NaN score should make F.multi_margin_loss and F.multilabel_margin_loss NaN.
# In eager mode they are 0.0, as for a perfect score; compiled they are NaN. At the margin the
# gradients differ too (0 eager, -2/3 compiled). Hurts whoever watches the loss for NaN.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import math

import torch
import torch.nn.functional as F

print("torch", torch.__version__)


def value_and_gradient(loss, scores, target):
    x = scores.clone().requires_grad_()
    value = loss(x, target)
    return value.item(), torch.autograd.grad(value, x)[0][0].tolist()


nan = torch.tensor([[float("nan"), 1.0, 0.0]])
edge = torch.tensor([[1.0, 0.0, 0.0]])
as_found = True
for loss, target in [
    (F.multi_margin_loss, torch.tensor([0])),
    (F.multilabel_margin_loss, torch.tensor([[0, -1, -1]])),
]:
    compiled = torch.compile(loss, backend="aot_eager")
    pairs = [value_and_gradient(f, x, target) for x in (nan, edge) for f in (loss, compiled)]
    print(loss.__name__, "of a NaN score, eager:", pairs[0], "compiled:", pairs[1])
    print(loss.__name__, "at the margin, eager:", pairs[2], "compiled:", pairs[3])
    as_found &= pairs[0][0] == 0.0 and math.isnan(pairs[1][0])
    as_found &= pairs[2][1] == [0.0] * 3
    if loss is F.multi_margin_loss:
        as_found &= math.isclose(pairs[3][1][0], -2 / 3, rel_tol=1e-6)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
