"""The linear loss agrees with its layer and the loss, for plain, wrapped and replaced layers."""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from torchlosses import LinearCrossEntropyError, checks, linear
from torchlosses.functional import cross_entropy_error

FEATURES, CLASSES = 4, 5


class Adapter(nn.Module):
    """A frozen layer and a low-rank adapter; `weight` is that of the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(FEATURES, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, CLASSES, bias=False, dtype=torch.float64)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, input: Tensor) -> Any:
        return self.base(input) + self.up(self.down(input))


class ScaledForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class ScaledCall(nn.Linear):
    def __call__(self, input: Tensor) -> Any:
        return super().__call__(input) * 3


class FakeQuantized(nn.Linear):
    """A layer for quantization-aware training, with a straight-through gradient."""

    def forward(self, input: Tensor) -> Tensor:
        rounded = (self.weight * 4).round() / 4
        return F.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


class CustomProduct(Tensor):
    """A weight that overrides `F.linear`, as quantized weights do."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = super().__torch_function__(function, types, arguments, options or {})
        return result.as_subclass(Tensor) * 3 if function is F.linear else result


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replace_layer(criterion: LinearCrossEntropyError, type: type[nn.Linear]) -> None:
    layer = type(FEATURES, CLASSES, bias=criterion.linear.bias is not None, dtype=torch.float64)
    layer.load_state_dict(criterion.linear.state_dict())
    criterion.linear = layer


def adapt(criterion: LinearCrossEntropyError) -> None:
    criterion.linear = Adapter(criterion.linear)  # type: ignore[assignment]


def parametrize_weight(criterion: LinearCrossEntropyError, method: str) -> None:
    """Parametrizations of the weight, and the older norms that hooks recompute."""
    layer = criterion.linear
    if method == "weight_norm":
        parametrizations.weight_norm(layer)
    elif method == "parametrize":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif method == "old_spectral_norm":
        nn.utils.spectral_norm(layer)
    else:
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(layer)
        layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def prune_weight(criterion: LinearCrossEntropyError) -> None:
    layer: Any = criterion.linear
    prune.random_unstructured(layer, "weight", 0.5)
    with torch.no_grad():  # Only the next call of the layer updates `weight`.
        layer.weight_orig.add_(1)


def add_hook(criterion: LinearCrossEntropyError, kind: str) -> None:
    layer: Any = criterion.linear
    if kind == "forward":
        layer.register_forward_hook(lambda layer, arguments, output: output * 3)
    elif kind == "forward-pre":
        layer.register_forward_pre_hook(lambda layer, arguments: (arguments[0] * 3,))
    elif kind == "backward":
        layer.register_full_backward_hook(lambda layer, grads, of_output: (grads[0] * 3,))
    else:
        layer.register_full_backward_pre_hook(lambda layer, grads: (grads[0] * 3,))


def replace_forward(criterion: LinearCrossEntropyError) -> None:
    """As libraries do that move the weight to the device for each call."""
    forward = criterion.linear.forward
    criterion.linear.forward = lambda input: forward(input * 3)  # type: ignore[method-assign]


def script(criterion: LinearCrossEntropyError, compile: Callable[[nn.Module], Any]) -> None:
    criterion.linear = compile(criterion.linear)


def subclass_weight(criterion: LinearCrossEntropyError) -> None:
    weight = criterion.linear.weight.detach().as_subclass(CustomProduct)
    criterion.linear.weight = nn.Parameter(weight)


# What changes the layer, and whether the loss may still be fused with it.
CHANGES: dict[str, tuple[Callable[[LinearCrossEntropyError], Any], bool]] = {
    "none": (lambda criterion: None, True),
    "parametrize": (functools.partial(parametrize_weight, method="parametrize"), True),
    "weight_norm": (functools.partial(parametrize_weight, method="weight_norm"), True),
    "adapter": (adapt, False),
    "identity": (lambda criterion: setattr(criterion, "linear", nn.Identity()), False),
    "subclass": (functools.partial(replace_layer, type=ScaledForward), False),
    "subclass-call": (functools.partial(replace_layer, type=ScaledCall), False),
    "fake-quantized": (functools.partial(replace_layer, type=FakeQuantized), False),
    "old_spectral_norm": (functools.partial(parametrize_weight, method="old_spectral_norm"), False),
    "old_weight_norm": (functools.partial(parametrize_weight, method="old_weight_norm"), False),
    "prune": (prune_weight, False),
    "hook-forward": (functools.partial(add_hook, kind="forward"), False),
    "hook-forward-pre": (functools.partial(add_hook, kind="forward-pre"), False),
    "hook-backward": (functools.partial(add_hook, kind="backward"), False),
    "hook-backward-pre": (functools.partial(add_hook, kind="backward-pre"), False),
    "forward-replaced": (replace_forward, False),
    "scripted": (functools.partial(script, compile=torch.jit.script), False),
    "traced": (
        functools.partial(
            script, compile=lambda layer: torch.jit.trace(layer, torch.rand(3, FEATURES).double())
        ),
        False,
    ),
    "weight-subclass": (subclass_weight, True),
}


def make(name: str, bias: bool) -> LinearCrossEntropyError:
    criterion = LinearCrossEntropyError(
        FEATURES, CLASSES, bias=bias, weight=torch.rand(CLASSES).double(), delta=1e-3,
        reduction="mean", label_smoothing=0.1, dtype=torch.float64,
    )  # fmt: skip
    CHANGES[name][0](criterion)
    return criterion.eval()  # In training mode each call of a spectral norm updates its buffers.


def results(loss: Tensor, criterion: nn.Module, input: Tensor) -> list[Tensor | None]:
    leaves = [input, *(p for p in criterion.parameters() if p.requires_grad)]
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def check(criterion: LinearCrossEntropyError, call: Callable[..., Tensor]) -> None:
    width = CLASSES if isinstance(criterion.linear, nn.Identity) else FEATURES
    input = torch.randn(3, 2, width, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "weight": criterion.weight, "delta": criterion.delta, "reduction": criterion.reduction,
        "label_smoothing": criterion.label_smoothing, "from_logits": True, "dim": -1,
    }  # fmt: skip
    for target in (
        torch.tensor([[0, 1], [2, 3], [4, -100]]),
        torch.rand(3, 2, CLASSES).softmax(-1),
    ):
        sample_weight = torch.rand(3, 2)
        loss = call(input, target, sample_weight=sample_weight)
        actual = results(loss, criterion, input)
        expected = results(
            cross_entropy_error(
                criterion.linear(input), target, sample_weight=sample_weight, **options
            ),
            criterion,
            input,
        )
        assert any(gradient is not None for gradient in actual[2:]) or width == CLASSES
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_loss_agrees_with_the_layer(name: str, bias: bool, path: str) -> None:
    criterion = make(name, bias)
    check(criterion, criterion)
    with mock.patch.object(linear, "compute", wraps=linear.compute) as fused:
        criterion(
            torch.randn(2, CLASSES if name == "identity" else FEATURES).double(), torch.arange(2)
        )
    assert fused.called == CHANGES[name][1]


# Dynamo calls neither backward hooks nor the `__call__` of a subclass, and traces neither tensor
# subclasses nor scripted modules.
UNTRACED = (
    "subclass-call", "hook-backward", "hook-backward-pre", "weight-subclass", "scripted", "traced",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in UNTRACED])
def test_compiled_loss_agrees_with_the_layer(name: str) -> None:
    torch.compiler.reset()
    criterion = make(name, bias=True)
    check(criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager"))


def test_global_module_hooks_run(path: str) -> None:
    called = []
    criterion = make("none", bias=True)
    register: Any
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda module, *_: called.append(module))
        try:
            criterion(torch.randn(2, FEATURES).double(), torch.arange(2))
        finally:
            handle.remove()
        assert criterion.linear in called
        called.clear()


def test_a_quantized_layer(path: str) -> None:
    criterion = LinearCrossEntropyError(FEATURES, CLASSES)
    layer: Any = nn.Module()
    layer.weight = lambda: None  # torch's quantized layers have a method of this name.
    layer.forward = lambda input: F.pad(input, (0, 1))
    criterion.linear = layer
    input = torch.randn(2, FEATURES)
    expected = cross_entropy_error(layer(input), torch.arange(2), from_logits=True)
    assert criterion(input, torch.arange(2)) == expected


def test_this_torch_has_the_private_names_that_tell_plain_layers() -> None:
    """Without them no layer would count as plain, and no loss would be fused."""
    assert linear.has_global_hook is not checks.assume_yes
    assert linear.is_unmodified(nn.Linear(1, 1))
    assert linear.is_unmodified(copy.deepcopy(nn.Linear(1, 1)))
