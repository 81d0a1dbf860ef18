#!/usr/bin/env bash
# torch 2.13.0: F.kl_div should give 0 where the target probability is 0, as it does for targets
# given as probabilities. With log_target=True such an entry (-inf) makes the loss 0 * -inf = NaN,
# with a finite gradient. Hurts distillation from a teacher with masked logits (log_softmax: -inf).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
log_student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
teacher = torch.tensor([[1.0, 0.0]])
plain = F.kl_div(log_student, teacher, reduction="batchmean")
logged = F.kl_div(log_student, teacher.log(), reduction="batchmean", log_target=True)
(grad,) = torch.autograd.grad(logged, log_student)
print("targets [1, 0]:", plain.item())
print("log targets [0, -inf]:", logged.item(), "gradient:", grad[0].tolist())
as_found = torch.allclose(plain, torch.tensor(2.0).log()) and bool(logged.isnan())
as_found &= bool(grad.isfinite().all())
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
