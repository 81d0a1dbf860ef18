#!/usr/bin/env bash
# fastai 2.8.12: equal class weights should cancel in the mean of a cross-entropy, as they do
# without MixUp. With MixUp the mean divides by the samples, not by the weights: weights of 10 make
# loss and gradient 10 times as large. Hurts learning rates tuned without MixUp or CutMix.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 fastai==2.8.12 numpy==2.4.6
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import random

import fastai
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import TensorDataset

print("torch", torch.__version__, "fastai", fastai.__version__)
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 20), torch.randint(3, (64,)))
network = nn.Linear(20, 3)


class Seen(Callback):
    order = 100

    def before_backward(self):
        if self.training:
            losses.append(self.learn.loss_grad.item())


as_found = True
for callbacks, ratio in [([], 1.0), ([MixUp()], 10.0)]:
    losses = []
    for weight in (None, torch.full((3,), 10.0)):
        random.seed(0)
        torch.manual_seed(0)
        loaders = DataLoaders.from_dsets(data, data, bs=64, device="cpu")
        learner = Learner(loaders, network, CrossEntropyLossFlat(weight=weight), opt_func=SGD)
        with learner.no_logging():
            learner.fit(1, lr=0.0, cbs=[*callbacks, Seen()])
    print("with MixUp:" if callbacks else "without:", "no weights, weights of 10:", losses)
    as_found &= abs(losses[1] / losses[0] / ratio - 1) < 1e-4
raise SystemExit(0 if as_found else "The behaviour changed.")
EOF
