#!/usr/bin/env bash
# torch 2.14.1: within `if n == 7`, torch.compile knows the value of n, so a function marked with
# torch.compiler.assume_constant_result should take it.
# The first graph, of n = 5, passes it. From the second n on, the compiler holds n as a symbol. The
# comparison fixes its value, and the conversion to a constant still fails; operator.index(n) works.
# Hurts libraries that compute constants of a graph from sizes or options: the first call works.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import operator

import torch

print("torch", torch.__version__)


@torch.compiler.assume_constant_result
def tenfold(n):
    return 10 * n


def scaled(x, n, convert):
    return x * tenfold(convert(n)) if n in (5, 7) else x * n


def run(convert):
    torch.compiler.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    results = []
    for n in (5, 6, 7):
        try:
            results.append(compiled(torch.ones(1), n, convert).item())
        except Exception as error:
            results.append(str(error).splitlines()[0])
    return results


as_it_is, by_index = run(lambda n: n), run(operator.index)
print("n itself:", as_it_is)
print("operator.index(n):", by_index)
as_found = (
    as_it_is == [50.0, 6.0, "assume_constant_result argument conversion failed"]
    and by_index == [50.0, 6.0, 70.0]
)
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
