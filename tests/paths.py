"""The ways to a loss."""

from typing import Any

import pytest

from torchlosses import ops


def use_kernels(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Any]) -> None:
    """Replaces `ops.KERNELS`, and forgets the calls that are known of it."""
    monkeypatch.setattr(ops, "KERNELS", kernels)
    monkeypatch.setattr(ops, "_prepared", {})
