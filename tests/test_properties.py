"""Determinism, sizes beyond 32 bits, NaN and empty tensors."""

import itertools
from typing import Any

import pytest
import torch
from samples import REDUCTIONS, reference

from torchlosses import CrossEntropyError, SumSquaredError, functional
from torchlosses.functional import cross_entropy_error, sum_squared_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_deterministic(dtype: torch.dtype, device: str) -> None:
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
    """A row that is one expanded entry, with a label beyond 2³¹."""
    classes = 2**31 + 64
    row = torch.full((1, 1), 0.5).expand(1, classes)
    loss = cross_entropy_error(row, torch.tensor([classes - 1]), delta=0)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    with pytest.raises(IndexError, match=str(classes)):
        cross_entropy_error(row, torch.tensor([classes]))


def test_nan_propagates(device: str) -> None:
    y = torch.tensor([[0.2, torch.nan], [0.5, 0.5]], device=device)
    t = torch.tensor([1, 0], device=device)
    for from_logits in (False, True):
        loss = cross_entropy_error(y, t, from_logits=from_logits, reduction="none")
        assert loss.isnan().tolist() == [True, False]
    assert sum_squared_error(y, t).isnan()


@pytest.mark.parametrize("form", ["sse", "probabilities", "logits"])
@pytest.mark.parametrize("is_index", [False, True])
def test_empty_and_small_shapes_match_the_reference(
    form: str, is_index: bool, path: str, device: str
) -> None:
    """Every shape of sizes 0, 1 and 3; with no class, all labels are ignored."""
    name = "sum_squared_error" if form == "sse" else "cross_entropy_error"
    loss: Any = getattr(functional, name)
    shapes = [s for rank in (1, 2, 3) for s in itertools.product((0, 1, 3), repeat=rank)]
    for shape, reduction, is_weighted in itertools.product(shapes, REDUCTIONS, (False, True)):
        if len(shape) == 3 and 0 not in shape and is_weighted == (reduction in ("sum", "mean")):
            continue  # Half of the combinations, for shapes of three dimensions without a 0.
        for dim in range(len(shape)):
            samples = shape[:dim] + shape[dim + 1 :]
            options: dict[str, Any] = {"reduction": reduction, "dim": dim}
            y = torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
            t = torch.rand(shape, dtype=torch.float64, device=device)
            if is_index:
                t = torch.full(samples, shape[dim] - 1 or -100, device=device)
                t[t < 0] = -100
            if form != "sse":
                options["from_logits"] = form == "logits"
                if is_weighted:
                    options["weight"] = torch.rand(shape[dim], dtype=y.dtype, device=device)
                    options["label_smoothing"] = 0.1
            if is_weighted:
                full = shape if form == "sse" and not is_index else samples
                options["sample_weight"] = torch.rand(full, dtype=y.dtype, device=device)
            arguments = {"input": y, "target": t} | options
            expected, expected_grad = reference(name, arguments)
            value = loss(**arguments)
            # The formula computes further derivatives, to which a third dimension adds little.
            is_small = len(shape) < 3 or shape in ((0, 3, 1), (3, 1, 3))
            is_formula = path == "formula" and is_small
            results = [value, *torch.autograd.grad(value.sum(), y, create_graph=is_formula)]
            numbers = [expected, expected_grad]
            if is_formula:
                results += torch.func.jvp(
                    lambda y, a=arguments: loss(**a | {"input": y}).sum(),
                    (y,),
                    (torch.ones_like(y),),
                )[1:]
                numbers.append(expected_grad.sum())
            torch.testing.assert_close(
                [actual.detach().cpu() for actual in results],
                [torch.as_tensor(x) for x in numbers],
                rtol=1e-10,
                atol=1e-12,
            )
