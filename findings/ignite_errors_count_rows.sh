#!/usr/bin/env bash
# pytorch-ignite 0.5.5: MeanSquaredError and MeanAbsoluteError of (N, K) outputs should divide by
# N K, as torch and scikit-learn do. They divide by N, so they are K times as large, and the root of
# the first sqrt(K) times. Hurts multi-output regression that is compared with a validation loss.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 pytorch-ignite==0.5.5 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import ignite
import torch
import torch.nn.functional as F
from ignite.metrics import MeanAbsoluteError, MeanSquaredError, RootMeanSquaredError

print("torch", torch.__version__, "ignite", ignite.__version__)
torch.manual_seed(0)
as_found = True
for outputs in (1, 4):
    y, t = torch.randn(8, outputs), torch.randn(8, outputs)
    for metric, wanted, ratio in [
        (MeanSquaredError(), F.mse_loss(y, t), outputs),
        (MeanAbsoluteError(), F.l1_loss(y, t), outputs),
        (RootMeanSquaredError(), F.mse_loss(y, t).sqrt(), outputs**0.5),
    ]:
        metric.update((y, t))
        found = metric.compute()
        print(f"{type(metric).__name__} of {outputs} outputs: {found:.4f}, torch: {wanted:.4f}")
        as_found &= abs(found / wanted.item() / ratio - 1) < 1e-5
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
