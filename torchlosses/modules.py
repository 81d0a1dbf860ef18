"""The losses as modules, which hold the options."""

from typing import Any

import torch
from torch import Tensor, nn

from torchlosses import checks, functional, linear
from torchlosses.checks import Reduction

__all__ = ["CrossEntropyError", "LinearCrossEntropyError", "SumSquaredError"]


class SumSquaredError(nn.Module):
    r"""Sum of squared errors, :math:`E = \frac12 \sum_k (y_k - t_k)^2`.

    The factor ½ makes the gradient plain: ∂E/∂y = y − t and ∂E/∂t = t − y. The value is half of
    :class:`torch.nn.MSELoss`, which has no such factor; its own default reduction is ``'mean'``.

    Args:
        reduction: ``'sum'`` (default); ``'mean'``, over all elements; ``'batchmean'``, the sum
            divided by ``input.shape[0]``, or by 1 for an input of at most one dimension;
            ``'none'``, a loss per element.
        dim: the class dimension, for targets that are class indices. By default 1, or 0 for a 1-D
            input.
        ignore_index: samples with this class index add nothing to value, gradient or divisor. Any
            value but −100 beside a dense target is an error.

    Call it with:
        - **input** (y): any shape, any floating dtype.
        - **target** (t): the shape of `input` with any real dtype; or class indices, of any integer
          dtype and the shape of `input` without `dim`, which stand for their one-hot rows.
        - **sample_weight** (optional): real factors that broadcast to `target`: one per element, or
          one per sample with class indices. ``'mean'`` divides by their sum over the elements.

    Returns:
        A 0-D tensor, or with ``'none'`` one of the input's shape, in the squared unit of the data.
        float64 if input and target promote to it, else float32: float16 and bfloat16 are computed
        in float32 too. Gradients have the dtypes of their tensors. ``'mean'`` and ``'batchmean'``
        over nothing are 0.

    Raises:
        ValueError: an unknown `reduction`, when the module is made. In the call: `dim` out of
            range, shapes that do not fit, tensors on different devices, `ignore_index` set beside a
            dense target.
        TypeError: an `input` that is not floating, a complex tensor, a floating or boolean `target`
            where only class indices fit.
        IndexError: a class index out of range, on the CPU. On another device, under `torch.compile`
            and under `vmap`, that sample's loss and gradient are NaN instead; to find it there, run
            under :func:`torch.autograd.detect_anomaly`.

    Source: C. M. Bishop, *Pattern Recognition and Machine Learning*, eq. 1.2; K. Saitō, *Deep
    Learning from Scratch*, ch. 4.

    Example:
        >>> import torch
        >>> from torchlosses import SumSquaredError
        >>> criterion = SumSquaredError()
        >>> y = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]], requires_grad=True)
        >>> t = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> loss = criterion(y, t)
        >>> loss
        tensor(0.2500, grad_fn=<...>)
        >>> loss.backward()
        >>> y.grad
        tensor([[ 0.1000, -0.4000,  0.3000],
                [ 0.2000,  0.2000, -0.4000]])
        >>> criterion(y, torch.tensor([1, 2]))  # the same target as class indices
        tensor(0.2500, grad_fn=<...>)
    """

    def __init__(
        self, *, reduction: Reduction = "sum", dim: int | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        options = checks.check_options(reduction, dim, ignore_index)
        self.reduction: Reduction = reduction
        self.dim, self.ignore_index = options.dim, options.ignore_index

    @torch.jit.unused  # So that a model that holds a loss can be scripted.
    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return functional.sum_squared_error(
            input,
            target,
            reduction=self.reduction,
            dim=self.dim,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, dim={self.dim}, ignore_index={self.ignore_index}"


class CrossEntropyError(nn.Module):
    r"""Cross-entropy guarded by a δ, :math:`E = -\sum_k t_k \log(y_k + \delta)`, in nats.

    `input` holds **probabilities**, such as a softmax puts out; with ``from_logits=True`` it holds
    logits, and the softmax is taken here. The guard is added to y, so log 0 never happens: where a
    clip would end the gradient, ∂E/∂y = −t / (y + δ) stays finite, at most 1/δ. The derivative for
    a target is ∂E/∂t = −log(y + δ). The value is slightly negative where y is close to 1.

    From logits, with p = softmax(x), ∂E/∂xⱼ = pⱼ·(S − tⱼ/(pⱼ+δ)) where S = Σₖ tₖpₖ/(pₖ+δ). For a
    class index c that is s·(pⱼ − [j=c]) with s = p_c/(p_c+δ): the gradient of the exact
    cross-entropy, gated by how much the network believes in the right class. A sample that is
    confidently wrong (p_c much smaller than δ) gives no gradient. With ``delta=0`` this is the
    exact log-softmax cross-entropy, the same as :class:`torch.nn.CrossEntropyLoss`.

    On probabilities with class indices the value is that of :class:`torch.nn.NLLLoss` on
    log(y + δ). It is not that of :class:`torch.nn.BCELoss`, which adds −(1−t)·log(1−y) and clamps
    the logarithm, nor that of Keras, which renormalises y and clips it to [ε, 1−ε].

    Args:
        weight: class weights, of shape (C,), as in :class:`torch.nn.CrossEntropyLoss`. A buffer of
            the module; an :class:`torch.nn.Parameter` becomes a parameter of it.
        reduction: ``'sum'`` (default); ``'mean'``, which divides by the sum of the target classes'
            weights for class indices and by the number of samples for other targets;
            ``'batchmean'``, the sum divided by ``input.shape[0]``, or by 1 for an input of at most
            one dimension; ``'none'``, a loss per sample.
        delta: the guard δ, at least 0. With 0, a term 0·log 0 is the constant 0.
        from_logits: whether `input` holds logits instead of probabilities. Logits of −inf are fine
            wherever the target is 0.
        dim: the class dimension. By default 1, or 0 for a 1-D input.
        ignore_index: samples with this class index add nothing to value, gradient or divisor. Any
            value but −100 beside a dense target is an error.
        label_smoothing: ε in [0, 1]: the target is taken as (1−ε)·t + ε/C.

    Call it with:
        - **input** (y, or logits x): any shape with a class dimension, any floating dtype.
        - **target** (t): the shape of `input` with any real dtype, one-hot or soft; or class
          indices, of any integer dtype and the shape of `input` without `dim`.
        - **sample_weight** (optional): real factors that broadcast to the samples, the shape of
          `input` without `dim`. ``'mean'`` divides by their sum.

    Returns:
        A 0-D tensor, or with ``'none'`` one of the input's shape without `dim`, in nats. float64 if
        input and target promote to it, else float32: float16 and bfloat16 are computed in float32
        too. Gradients have the dtypes of their tensors: float16 ends at 65504, far below
        1/δ. ``'mean'`` and ``'batchmean'`` over nothing are 0.

    Raises:
        ValueError: an unknown `reduction`, a `delta` that is negative or not finite, a
            `label_smoothing` outside [0, 1] or a `weight` that is not 1-D, when the module is made.
            In the call: `dim` out of range, shapes that do not fit, tensors on different devices,
            `ignore_index` set beside a dense target.
        TypeError: an `input` that is not floating, a complex tensor, a floating or boolean `target`
            where only class indices fit.
        IndexError: a class index out of range, on the CPU. On another device, under `torch.compile`
            and under `vmap`, that sample's loss and gradient are NaN instead.

    :func:`torch.autograd.detect_anomaly` makes the losses check values on every device: a class
    index out of range is an ``IndexError``, and a probability outside [0, 1] a ``ValueError``. Soft
    targets that are not distributions, and logits that are, give a ``UserWarning``.

    Source: K. Saitō, *Deep Learning from Scratch*, ch. 4.

    Example:
        >>> import torch
        >>> from torchlosses import CrossEntropyError
        >>> criterion = CrossEntropyError()
        >>> y = torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.5, 0.5]], requires_grad=True)
        >>> loss = criterion(y, torch.tensor([1, 0]))
        >>> loss
        tensor(16.6289, grad_fn=<...>)
        >>> criterion(y, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])).item() == loss.item()
        True
        >>> loss.backward()
        >>> y.grad
        tensor([[ 0.0000e+00, -1.6667e+00,  0.0000e+00],
                [-1.0000e+07,  0.0000e+00,  0.0000e+00]])
        >>> criterion = CrossEntropyError(from_logits=True, reduction="mean")
        >>> criterion(torch.zeros(4, 10), torch.arange(4))
        tensor(2.3026)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "sum",
        delta: float = 1e-7,
        from_logits: bool = False,
        dim: int | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        options = checks.check_options(
            reduction, dim, ignore_index, delta, label_smoothing, from_logits
        )
        self.dim, self.ignore_index = options.dim, options.ignore_index
        self.delta, self.label_smoothing = options.delta, options.label_smoothing
        checks.check_weight(weight)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)
        self.reduction: Reduction = reduction
        self.from_logits = from_logits

    @torch.jit.unused  # So that a model that holds a loss can be scripted.
    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return functional.cross_entropy_error(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            delta=self.delta,
            from_logits=self.from_logits,
            dim=self.dim,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        weight = "None" if self.weight is None else f"tensor of {tuple(self.weight.shape)}"
        return (
            f"weight={weight}, reduction={self.reduction!r}, delta={self.delta}, "
            f"from_logits={self.from_logits}, dim={self.dim}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


class LinearCrossEntropyError(nn.Module):
    r"""A linear layer and the :class:`CrossEntropyError` of its logits, in one call.

    .. math:: E = -\sum_k t_k \log(\mathrm{softmax}(Wx + b)_k + \delta)

    The value and all derivatives are those of ``CrossEntropyError(from_logits=True, dim=-1)`` on
    the layer's output. It computes a few hundred to a few thousand rows of logits at a time, and
    overwrites them with their gradient. Beyond its arguments a training step allocates the
    gradients, the logits of those rows, and a few numbers per sample. With many classes, such as
    the tokens of a language model, logits and their gradient would take most of the memory.
    In half precision the weight's gradient adds up in its own dtype over at most six chunks, or
    in float32 over more: its error is at most about twice that of one matrix product.

    With ``reduction='none'`` and in float16, backward computes the logits again. Beyond a first
    derivative (create_graph, forward mode, :mod:`torch.func`) and in exported graphs, memory holds
    all logits. Class or sample weights that require a gradient, and machines without kernels, cost
    time but no memory, except in compiled graphs. Soft targets whose rows are not evenly spaced,
    such as a transpose of (batch, V, time), are copied.

    Args:
        in_features: D, the size of a sample.
        num_classes: V, the classes.
        bias: whether the layer has a bias b.
        weight: class weights, of shape (V,), as in :class:`CrossEntropyError`; the layer's weight W
            is ``linear.weight``.
        reduction: as in :class:`CrossEntropyError`.
        delta: the guard δ, at least 0. 0 is the exact cross-entropy. With δ > 0 confidently wrong
            samples get no gradient.
        ignore_index: samples with this class index add nothing to value, gradient or divisor,
            whatever they hold, and on the CPU take no time. Any value but −100 beside a dense
            target is an error.
        label_smoothing: ε in [0, 1]: the target is taken as (1−ε)·t + ε/V.
        device: the layer's device.
        dtype: the layer's dtype.

    Call it with:
        - **input** (x): shape (..., D), in the layer's floating dtype; under autocast, in any dtype
          that autocast casts.
        - **target** (t): class indices, of any integer dtype and shape (...); or one-hot or soft
          targets of shape (..., V), with any real dtype.
        - **sample_weight** (optional): real factors that broadcast to (...). ``'mean'`` divides by
          their sum.

    Returns:
        A 0-D tensor, or with ``'none'`` one of shape (...), in nats. float64 if input or target
        are, else float32. Gradients have the dtypes of their tensors. ``'mean'`` and
        ``'batchmean'`` over nothing are 0.

    Raises:
        ValueError: an unknown `reduction`, a `delta` that is negative or not finite, a
            `label_smoothing` outside [0, 1] or a `weight` that is not (V,), when the module is
            made. In the call: shapes that do not fit, tensors on different devices, `ignore_index`
            set beside a dense target.
        TypeError: an `input` that is not floating or not in the layer's dtype, a complex tensor, a
            floating or boolean `target` where only class indices fit.
        IndexError: a class index out of range, on the CPU. On another device, under `torch.compile`
            and under `vmap`, that sample's loss and gradient are NaN instead.

    The layer is ``self.linear``, an :class:`torch.nn.Linear`, as in
    :class:`torch.nn.LinearCrossEntropyLoss`, whose state dict can be loaded. Another library may
    replace it by an adapter, a quantized layer or one with hooks; then all logits are in memory,
    and ignored rows pass through the layer. Set a weight that another module shares, such as an
    embedding's, as ``linear.weight``, or pass it to
    :func:`torchlosses.functional.linear_cross_entropy_error`. Several processes can share the
    classes: make the weight a :class:`~torch.distributed.tensor.DTensor` of placement
    ``Shard(0)``. Under `fully_shard`, wrap this module or one around it.

    Source: K. Saitō, *Deep Learning from Scratch*, ch. 4, for the formula; E. Wijmans et al., *Cut
    Your Losses in Large-Vocabulary Language Models*, for computing the logits in parts.

    Example:
        >>> import torch
        >>> from torchlosses import LinearCrossEntropyError
        >>> criterion = LinearCrossEntropyError(2, 3, reduction="mean")
        >>> _ = torch.nn.init.zeros_(criterion.linear.weight)
        >>> x, t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2, 0])
        >>> loss = criterion(x, t)
        >>> loss
        tensor(1.0986, grad_fn=<...>)
        >>> loss.backward()
        >>> criterion.linear.weight.grad
        tensor([[-0.8333, -1.0000],
                [ 0.6667,  1.0000],
                [ 0.1667,  0.0000]])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: Tensor | None = None,
        reduction: Reduction = "sum",
        delta: float = 1e-7,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = checks.check_options(reduction, None, ignore_index, delta, label_smoothing)
        self.ignore_index, self.delta = options.ignore_index, options.delta
        self.label_smoothing = options.label_smoothing
        checks.check_weight(weight, num_classes)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)
        self.reduction: Reduction = reduction
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused  # So that a model that holds a loss can be scripted.
    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        options: dict[str, Any] = {
            "weight": self.weight,
            "reduction": self.reduction,
            "delta": self.delta,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "sample_weight": sample_weight,
        }
        layer = self.linear
        if not linear.is_unmodified(layer):
            logits = layer(input)
            return functional.cross_entropy_error(
                logits, target, from_logits=True, dim=-1, **options
            )
        return functional.linear_cross_entropy_error(
            input, layer.weight, target, linear_bias=layer.bias, **options
        )

    def extra_repr(self) -> str:
        weight = "None" if self.weight is None else f"tensor of {tuple(self.weight.shape)}"
        return (
            f"weight={weight}, reduction={self.reduction!r}, delta={self.delta}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
