#!/usr/bin/env bash
# torch 2.13.0, CPU: F.binary_cross_entropy raises for inputs or targets outside [0, 1].
# Compiled by Inductor it checks nothing: a target of 2 gives a plausible loss, an input of 1.5
# gives NaN. Hurts whoever relies on the check with labels of 1 and 2, or 0 and 255.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$tmp/cache"
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
half, one = torch.tensor([0.5], requires_grad=True), torch.ones(1)
high = torch.tensor([1.5], requires_grad=True)


def outcome(loss, x, target):
    try:
        value = loss(x, target)
    except RuntimeError as error:
        return str(error)
    return value.item(), torch.autograd.grad(value, x)[0].item()


compiled = torch.compile(F.binary_cross_entropy)
as_found = True
for name, x, target, expected in [
    ("target of 2", half, 2 * one, "(0.69314"),
    ("input of 1.5", high, one, "(nan, "),
]:
    eager, found = outcome(F.binary_cross_entropy, x, target), outcome(compiled, x, target)
    print(name, "eager:", eager, "| compiled (loss, gradient):", found)
    as_found &= "should be between 0 and 1" in str(eager)
    as_found &= str(found).startswith(expected)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
