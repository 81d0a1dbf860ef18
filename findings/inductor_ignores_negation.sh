#!/usr/bin/env bash
# torch 2.14.1: torch.compile should read z.conj().imag as eager mode does.
# That is a view with a lazy negation (is_neg() is True). As an input of a graph, Inductor reads its
# memory without the sign, so every operation and loss is silently wrong; the backends "eager" and
# "aot_eager" are right. Hurts losses of complex-valued networks; z.conj().imag.resolve_neg() helps.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
z = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
y, t = z.conj().imag, torch.tensor([-3.0, -3.0])
eager = F.mse_loss(y, t).item()
compiled = {}
for backend in ("eager", "aot_eager", "inductor"):
    torch.compiler.reset()
    compiled[backend] = torch.compile(F.mse_loss, backend=backend)(y, t).item()
torch.compiler.reset()
resolved = torch.compile(F.mse_loss)(y.resolve_neg(), t).item()
print("y:", y.tolist(), "is_neg:", y.is_neg(), "loss:", eager)
print("compiled:", compiled, "after resolve_neg:", resolved)
as_found = (
    y.is_neg()
    and eager == resolved == 0.5
    and compiled == {"eager": 0.5, "aot_eager": 0.5, "inductor": 42.5}
)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
