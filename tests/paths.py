"""Which kernels the losses use."""

from typing import Any

import pytest

from torchlosses import ops


def use_kernels(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Any]) -> None:
    """Replaces `ops.KERNEL_LOADERS` and clears the cache of prepared calls."""
    monkeypatch.setattr(ops, "KERNEL_LOADERS", kernels)
    monkeypatch.setattr(ops, "_prepared", {})
