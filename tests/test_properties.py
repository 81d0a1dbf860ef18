"""The same bits again, sizes beyond 32 bits, and no NaN hidden."""

import pytest
import torch

from torchlosses import CrossEntropyError, SumSquaredError
from torchlosses.functional import cross_entropy_error, sum_squared_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_after_run(dtype: torch.dtype, device: str) -> None:
    y = torch.rand(512, 1000, device=device).to(dtype).requires_grad_()
    soft = torch.rand(512, 1000, device=device).to(dtype)
    index = torch.randint(1000, (512,), device=device)
    for criterion in (
        SumSquaredError(),
        CrossEntropyError(label_smoothing=0.1),
        CrossEntropyError(from_logits=True, reduction="mean"),
    ):
        for target in (soft, index):
            results = [
                (loss.item(), torch.autograd.grad(loss, y)[0])
                for loss in (criterion(y, target) for _ in range(3))
            ]
            for value, grad in results[1:]:
                assert value == results[0][0]
                assert torch.equal(grad, results[0][1])


def test_more_than_2_to_the_31_elements() -> None:
    """A row of which only one entry exists in memory, and is picked behind the 32-bit border."""
    classes = 2**31 + 64
    row = torch.full((1, 1), 0.5).expand(1, classes)
    loss = cross_entropy_error(row, torch.tensor([classes - 1]), delta=0)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    with pytest.raises(IndexError, match=str(classes)):
        cross_entropy_error(row, torch.tensor([classes]))


def test_nan_passes_through(device: str) -> None:
    y = torch.tensor([[0.2, torch.nan], [0.5, 0.5]], device=device)
    t = torch.tensor([1, 0], device=device)
    for from_logits in (False, True):
        loss = cross_entropy_error(y, t, from_logits=from_logits, reduction="none")
        assert loss.isnan().tolist() == [True, False]
    assert sum_squared_error(y, t).isnan()
