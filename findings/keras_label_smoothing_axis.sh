#!/usr/bin/env bash
# keras 3.15.1: CategoricalCrossentropy(axis=1, label_smoothing=0.3) should give each of the C
# classes 0.3 / C, as with axis=-1. It divides by the size of the last dimension, so targets of
# (N, C, W) no longer sum to 1. The focal loss does the same. Hurts channels-first segmentation.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 keras==3.15.1 numpy==2.4.6
KERAS_BACKEND=torch "$tmp/venv/bin/python" - "$tmp" <<'EOF'
import keras
import numpy as np

print("keras", keras.__version__, "on", keras.backend.backend())
rng = np.random.default_rng(0)
logits = rng.normal(size=(2, 3, 6)).astype("float32")
onehot = np.moveaxis(np.eye(3, dtype="float32")[rng.integers(3, size=(2, 6))], -1, 1)
as_found = True
for loss in (keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy):
    for smoothing in (0.0, 0.3):
        options = {"from_logits": True, "label_smoothing": smoothing}
        first = float(loss(axis=1, **options)(onehot, logits))
        last = float(loss(axis=-1, **options)(*(np.moveaxis(a, 1, -1) for a in (onehot, logits))))
        print(f"{loss.__name__}, smoothing {smoothing}: {first:.4f} (axis=1), {last:.4f} (axis=-1)")
        as_found &= np.isclose(first, last, rtol=1e-5) == (smoothing == 0.0)
smooth = (1 - 0.3) * onehot + 0.3 / logits.shape[-1]  # divided by the width
options = {"from_logits": True, "axis": 1}
by_width = float(keras.losses.CategoricalCrossentropy(**options)(smooth, logits))
found = float(keras.losses.CategoricalCrossentropy(label_smoothing=0.3, **options)(onehot, logits))
print(f"by the width: {by_width:.4f}, found: {found:.4f}")
as_found &= np.isclose(by_width, found, rtol=1e-6)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
