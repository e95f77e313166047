"""Operators that stand in for fused kernels while a cost is traced, and the FLOPs of all fused operators.

Shapes: B sequences, T positions, E input, H hidden, N rows of the softmax, V vocabulary.

A matrix product of [m, k] and [k, n] is 2 m k n FLOPs, and nothing else counts, as in torch's own counter. Backward of
an attention counts as twice its forward (Chowdhery et al., "PaLM", 2022, appendix B): that a flash kernel forms the
scores again is its own affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vae_dist.model import transformer
from vae_kernels import linear_cross_entropy_ops as loss_ops

Tensor = torch.Tensor
Shape = tuple[int, ...]

# Bytes that oneDNN's LSTM keeps for backward, for each sequence and each of T + 1 positions: so many times H, so many
# times the larger of E and H. Fitted to torch 2.13 on nine sizes; `tests/unit/test_estimate_trace.py` measures it.
_ONEDNN_WORKSPACE = {torch.float32: (37, 24), torch.bfloat16: (24, 20)}
# Its backward works on four gates in fp32, and copies and sums the weights in fp32.
_ONEDNN_GATES = 4
# cuDNN's is not documented: four gates, the cell and its tanh, in the type of the products.
_CUDNN_RESERVE = 6


class FusedKernels(TorchFunctionMode):
    """Within, LSTMs are one operator a layer, and a GPU's attention is a flash kernel with dropout, too."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu

    def __enter__(self) -> Any:
        # What is traced are tensors of the CPU, whose attention would take another way.
        self._longest = transformer.LONGEST_IN_PRODUCTS
        if self.on_gpu:
            transformer.LONGEST_IN_PRODUCTS = 0
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        transformer.LONGEST_IN_PRODUCTS = self._longest
        super().__exit__(*exception)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.lstm:
            return _lstm_layers(self.on_gpu, *args, **kwargs)
        if self.on_gpu and function is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


def _lstm_layers(
    on_gpu: bool,
    x_BTE: Tensor,
    state: tuple[Tensor, Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` in the one form that the models use."""
    assert has_biases and batch_first and not bidirectional
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BTE.dtype
    x_TBE, last_h, last_c = x_BTE.to(dtype).transpose(0, 1).contiguous(), [], []
    for layer in range(layers):
        h_BH, c_BH = (part[layer].to(dtype) for part in state)
        own = [weight.to(dtype) for weight in weights[4 * layer : 4 * layer + 4]]
        y_TBH, h_BH, c_BH, _ = lstm(x_TBE, h_BH, c_BH, *own, on_gpu)
        last_h.append(h_BH)
        last_c.append(c_BH)
        x_TBE = F.dropout(y_TBH, dropout, training) if layer + 1 < layers else y_TBH
    return x_TBE.transpose(0, 1), torch.stack(last_h), torch.stack(last_c)


@torch.library.custom_op("vae_estimate::lstm", mutates_args=())
def lstm(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor, gpu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [T, B, H], last h, last c [B, H], what the kernel keeps for backward, bytes): shapes alone."""
    raise NotImplementedError


@lstm.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (length, batch, width), hidden, on_gpu = x.shape, h.shape[-1], arguments[-1]
    own, wider = _ONEDNN_WORKSPACE.get(x.dtype, _ONEDNN_WORKSPACE[torch.float32])
    kept = batch * (length + 1) * (own * hidden + wider * max(width, hidden))
    if on_gpu:
        kept = batch * length * hidden * _CUDNN_RESERVE * x.dtype.itemsize
    workspace = x.new_empty(kept, dtype=torch.uint8)
    return x.new_empty(length, batch, hidden), h.new_empty(h.shape), c.new_empty(c.shape), workspace


@torch.library.custom_op("vae_estimate::lstm_backward", mutates_args=())
def lstm_backward(
    grad: Tensor, x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, workspace: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, the state's h, weight_ih, weight_hh, one bias): shapes alone."""
    raise NotImplementedError


@lstm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, workspace: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = weight_ih.new_empty(weight_ih.shape[0])
    return tuple(torch.empty_like(part) for part in (x, h, weight_ih, weight_hh, bias))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, c, weight_ih, weight_hh, *_ = inputs
    y, _, last_c, workspace = output
    ctx.save_for_backward(x, h, c, weight_ih, weight_hh, y, last_c, workspace)
    ctx.mark_non_differentiable(workspace)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, h, _, weight_ih, weight_hh, _, _, workspace = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    d_x, d_h, d_ih, d_hh, d_bias = lstm_backward(grad_y, x, h, weight_ih, weight_hh, workspace, needs)
    return d_x, d_h, torch.empty_like(d_h), d_ih, d_hh, d_bias, torch.empty_like(d_bias), None


lstm.register_autograd(_differentiate, setup_context=_keep)


def _lstm_flops(x: Shape, h: Shape, c: Shape, weight_ih: Shape, weight_hh: Shape, *rest: Any, **options: Any) -> int:
    length, batch = x[:2]
    return 2 * length * batch * (math.prod(weight_ih) + math.prod(weight_hh))


def _lstm_backward_flops(
    grad: Shape,
    x: Shape,
    h: Shape,
    weight_ih: Shape,
    weight_hh: Shape,
    workspace: Shape,
    needs: list[bool],
    **options: Any,
) -> int:
    length, batch = x[:2]
    inputs, recurrent = 2 * batch * math.prod(weight_ih), 2 * batch * math.prod(weight_hh)
    needs_x, needs_h = needs
    return length * inputs * (1 + needs_x) + length * recurrent + (length - 1 + needs_h) * recurrent


def _loss_and_gradients_flops(x: Shape, weight: Shape, bias: Shape | None, *rest: Any, **options: Any) -> int:
    needs = rest[2]
    return loss_flops(x, weight) * (1 + needs[0] + needs[1])


def _rows_flops(x: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    return loss_flops(x, weight)


def _rows_backward_flops(grad: Shape, x: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    kept, needs = rest[3], rest[4]
    formed_again = (x[0] - kept[0]) / max(1, x[0])
    return round(loss_flops(x, weight) * (needs[0] + needs[1] + formed_again))


def loss_flops(x: Shape, weight: Shape) -> int:
    """Of the logits of rows x [N, H] under a weight [V, H]."""
    return 2 * x[0] * x[1] * weight[0]


def _attention_flops(q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    (*batch, queries, width), keys, values = q, k[-2], v[-1]
    return 2 * math.prod(batch) * queries * keys * (width + values)


def _attention_backward_flops(grad: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    return 2 * _attention_flops(q, k, v)


def lstm_scratch(x: Shape, weight_ih: Shape, weight_hh: Shape) -> int:
    """Bytes that oneDNN's backward takes for itself while it runs, x [T, B, E]."""
    length, batch, hidden = x[0], x[1], weight_hh[-1]
    return 4 * (_ONEDNN_GATES * length * batch * hidden + math.prod(weight_ih) + math.prod(weight_hh))


def _packet(operator: Any) -> Any:
    """As the counter knows an operator that a library defines."""
    return operator._opoverload.overloadpacket


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.vae_estimate.lstm: _lstm_flops,
    torch.ops.vae_estimate.lstm_backward: _lstm_backward_flops,
    _packet(loss_ops.weighted): _loss_and_gradients_flops,
    _packet(loss_ops.rows): _rows_flops,
    _packet(loss_ops.rows_backward): _rows_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
