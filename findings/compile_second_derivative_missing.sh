#!/usr/bin/env bash
# torch 2.13.0: a compiled loss should support create_graph=True or refuse it, as F.mse_loss does.
# F.cross_entropy and similar losses return a gradient that requires grad but has no path to the
# input: its derivative is None. Hurts gradient penalties, which lose a term with allow_unused=True.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(4, 3, requires_grad=True)
labels = torch.tensor([0, 1, 2, 1])
targets = torch.rand(4, 3)


def second(loss, target, allow_unused):
    (first,) = torch.autograd.grad(loss(x, target), x, create_graph=True)
    assert first.requires_grad
    try:
        (out,) = torch.autograd.grad(first.square().sum(), x, allow_unused=allow_unused)
    except RuntimeError as error:
        return str(error).split(". ")[0]
    return out if out is None else "a tensor"


as_found = True
unused = "not have been used in the graph"
for loss, target, strict, loose in [
    (F.cross_entropy, labels, unused, None),
    (F.binary_cross_entropy_with_logits, targets, unused, None),
    (F.mse_loss, targets, "does not currently support double backward", "double backward"),
]:
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    found = [second(compiled, target, False), second(compiled, target, True)]
    print(loss.__name__, "eager:", second(loss, target, False))
    print(loss.__name__, "compiled:", found[0])
    print(loss.__name__, "compiled, allow_unused=True:", found[1])
    as_found &= strict in found[0]
    as_found &= str(loose) in str(found[1])
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
