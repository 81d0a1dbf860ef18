#!/usr/bin/env bash
# torch 2.13.0: a prediction of shape (3, 1) and a target of shape (3,) make F.mse_loss warn.
# F.poisson_nll_loss, F.kl_div, F.hinge_embedding_loss and F.margin_ranking_loss (target (1, 3))
# average all 9 pairs without a warning. Hurts models whose output has shape (N, 1).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import warnings

import torch
import torch.nn.functional as F

print("torch", torch.__version__)
x, t = torch.zeros(3, 1), torch.ones(3)
as_found = True
for name, loss, warns in [
    ("mse_loss", F.mse_loss, True),
    ("poisson_nll_loss", F.poisson_nll_loss, False),
    ("kl_div", F.kl_div, False),
    ("hinge_embedding_loss", F.hinge_embedding_loss, False),
    ("margin_ranking_loss", lambda x, t, **k: F.margin_ranking_loss(x, x, t[None], **k), False),
]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shape = tuple(loss(x, t, reduction="none").shape)
    said = any("target size" in str(entry.message) for entry in caught)
    print(f"{name}: losses of shape {shape}, warning: {said}")
    as_found &= shape == (3, 3) and said == warns
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
