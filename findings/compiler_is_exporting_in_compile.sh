#!/usr/bin/env bash
# torch 2.11.0: torch.compiler.is_exporting() should be True within torch.export only.
# It is True within torch.compile too (False in 2.13.0), so code with a slower, portable path for
# exports takes that path in every compiled model. Hurts libraries that branch on it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.11.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch

print("torch", torch.__version__)


def sign(x):
    return x + 1 if torch.compiler.is_exporting() else x - 1


zero = torch.zeros(1)
eager = sign(zero).item()
compiled = torch.compile(sign, backend="eager")(zero).item()
print("exporting, eager:", eager > 0, "compiled:", compiled > 0)
as_found = eager == -1.0 and compiled == 1.0
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
