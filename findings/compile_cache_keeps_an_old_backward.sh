#!/usr/bin/env bash
# torch 2.13.0: the disk cache of torch.compile should notice that an operator's backward changed.
# It keys the operator by name: the next process silently gets the gradient of the old backward.
# Hurts whoever fixes or switches a custom operator's backward and reruns a training script.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$tmp/cache"
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
cat >"$tmp/process.py" <<'EOF'
import sys

import torch

FACTOR = float(sys.argv[1])

library = torch.library.Library("probe", "DEF")
library.define("triple(Tensor x) -> Tensor")
library.impl("triple", lambda x: 3 * x, "CompositeExplicitAutograd")
torch.library.register_fake("probe::triple", torch.empty_like, lib=library)
torch.library.register_autograd("probe::triple", lambda ctx, g: FACTOR * g, lib=library)


def total(x):
    return torch.ops.probe.triple(x).sum()


x = torch.ones(3, requires_grad=True)
(eager,) = torch.autograd.grad(total(x), x)
(compiled,) = torch.autograd.grad(torch.compile(total)(x), x)
counts = torch._dynamo.utils.counters["aot_autograd"]
print("torch", torch.__version__, "backward of factor", FACTOR)
print("gradient, eager:", eager.tolist(), "compiled:", compiled.tolist())
print("cache hits:", counts["autograd_cache_hit"])
as_found = eager.tolist() == [FACTOR] * 3 and compiled.tolist() == [float(sys.argv[2])] * 3
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
# The first process fills the cache; the second has another backward (3) and is given 2.
"$tmp/venv/bin/python" "$tmp/process.py" 2 2
"$tmp/venv/bin/python" "$tmp/process.py" 3 2
# With an empty cache the second backward counts.
rm -r "$TORCHINDUCTOR_CACHE_DIR"
"$tmp/venv/bin/python" "$tmp/process.py" 3 3
