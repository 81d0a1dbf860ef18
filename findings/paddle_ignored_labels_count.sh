#!/usr/bin/env bash
# paddlepaddle 3.3.1: the mean of F.cross_entropy should not change with class weights of 1.
# Without weights the mean also divides by labels of ignore_index=-100, the default. With weights,
# or with an ignore_index of 7, it does not. Hurts padded batches: here the loss is 4/6 as large.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet paddlepaddle==3.3.1 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import numpy as np
import paddle
import paddle.nn.functional as F

print("paddle", paddle.__version__)
logits = paddle.to_tensor(np.random.default_rng(0).normal(size=(6, 3)).astype("float32"))
labels = np.array([0, 1, 2, 2, 1, 0])  # class 0 is padding
kept = paddle.to_tensor(labels > 0)
whole = float(F.cross_entropy(logits[kept], paddle.to_tensor(labels)[kept]))
print(f"the labels that count alone: {whole:.4f}")
as_found = True
for ignore_index in (-100, 7):
    padded = paddle.to_tensor(np.where(labels == 0, ignore_index, labels))
    plain = float(F.cross_entropy(logits, padded, ignore_index=ignore_index))
    weight = paddle.ones([3])
    weighted = float(F.cross_entropy(logits, padded, weight=weight, ignore_index=ignore_index))
    print(f"ignore_index={ignore_index}: {plain:.4f}, with weights of 1: {weighted:.4f}")
    as_found &= np.isclose(plain, whole * (4 / 6 if ignore_index < 0 else 1), rtol=1e-5)
    as_found &= np.isclose(weighted, whole, rtol=1e-5)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
