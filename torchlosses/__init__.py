"""Sum of squares and guarded cross-entropy as PyTorch loss modules."""

from torchlosses import functional, reference
from torchlosses.modules import CrossEntropyError, LinearCrossEntropyError, SumSquaredError

__all__ = [
    "CrossEntropyError",
    "LinearCrossEntropyError",
    "SumSquaredError",
    "functional",
    "reference",
]
__version__ = "0.2.0"
