#!/usr/bin/env bash
# transformers 5.24.0: Trainer.evaluate should give one eval_loss for one model and one data set.
# It weights the mean of each batch by its rows, not by its labels: with rows of unequal length the
# loss depends on per_device_eval_batch_size. Hurts perplexities that are compared between runs.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet \
    torch==2.14.1 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import sys

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=1.0,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(50, (8, 16))
labels = ids.clone()
labels[::2, 3:] = -100  # every other row is short
data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
with torch.no_grad():
    logits = model(ids).logits[:, :-1]
whole = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()
print(f"over all labels: {whole:.4f}")
found = {}
for size in (1, 8):
    arguments = TrainingArguments(
        sys.argv[1], per_device_eval_batch_size=size, use_cpu=True, disable_tqdm=True
    )
    found[size] = Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"]
    print(f"eval_loss in batches of {size}: {found[size]:.4f}")
as_found = abs(found[8] - whole) < 1e-4 and abs(found[1] - whole) > 0.02
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
