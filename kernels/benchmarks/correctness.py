"""Errors against float64, and the gate that ours must pass before it is timed.

Shapes: N rows, H hidden, V vocabulary. The float64 results are formed by chunks of rows, so memory stays bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from contender import Contender, Loss
from contenders import step
from problem import Inputs

SLACK = 1e-4
# Allowed where the plain form itself does not fit in memory: a few units of the last place of the dtype.
_WITHOUT_YARDSTICK = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}

Errors = dict[str, float]


class WrongKernelError(Exception):
    """One of our operations failed its gate; the message names it and its errors."""


@dataclass(frozen=True)
class Reference:
    """float64 results on the host.

    Attributes:
        nll: [N].
        dx: [N, H], gradient of each row's own loss.
        dw: [V, H] of each task with a gradient.
    """

    nll: torch.Tensor
    dx: torch.Tensor
    dw: dict[str, torch.Tensor]


@torch.no_grad()
def reference(inputs: Inputs, tasks: tuple[str, ...]) -> Reference:
    """Loss and gradients of `inputs` for the tasks among "mean" and "per_token"."""
    x_NH, weight_VH = inputs.x.double(), inputs.weight.double()
    row_weights = {task: _row_weight(inputs, task) for task in tasks if task != "forward"}
    dw = {task: torch.zeros_like(weight_VH) for task in row_weights}
    nll_N, dx_NH = x_NH.new_empty(len(x_NH)), torch.empty_like(x_NH)
    chunk = max(1, _CHUNK_BYTES[x_NH.device.type] // (8 * len(weight_VH)))
    for first in range(0, len(x_NH), chunk):
        rows = slice(first, first + chunk)
        logits_CV = x_NH[rows] @ weight_VH.t()
        lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
        at_target = inputs.target[rows, None]
        nll_N[rows] = (lse_C1 - logits_CV.gather(1, at_target))[:, 0]
        delta_CV = logits_CV.sub_(lse_C1).exp_()
        delta_CV.scatter_add_(1, at_target, torch.full_like(lse_C1, -1.0))
        dx_NH[rows] = delta_CV @ weight_VH
        for task, weight_N in row_weights.items():
            dw[task].addmm_(delta_CV.t(), weight_N[rows, None] * x_NH[rows])
    return Reference(nll_N.cpu(), dx_NH.cpu(), {task: gradient.cpu() for task, gradient in dw.items()})


def errors(contender: Contender, loss: Loss, inputs: Inputs, task: str, wanted: Reference) -> Errors:
    """How far the contender's own results are from float64.

    Returns:
        loss: of the mean, nats (not for "per_token").
        nll: largest over the rows, nats (where the contender shows rows).
        dx, dw: Frobenius norm of the error over that of the gradient (not for "forward").
        dx_max, dw_max: largest error of an element over the largest element.
    """
    value = step(loss, inputs, task)
    found: Errors = {}
    rows_N = value if task == "per_token" else None
    if task != "per_token":
        found["loss"] = abs(value.double().item() - wanted.nll.mean().item())
        if contender.rows is not None:
            with torch.no_grad():
                rows_N = contender.rows(inputs).detach()
    if rows_N is not None:
        found["nll"] = (rows_N.double().cpu() - wanted.nll).abs().max().item()
    if task != "forward":
        weight_N = _row_weight(inputs, task).cpu()
        found["dx"], found["dx_max"] = _distance(_gradient(inputs.x), wanted.dx, weight_N)
        found["dw"], found["dw_max"] = _distance(_gradient(inputs.weight), wanted.dw[task], None)
    inputs.clear()
    return found


def violations(ours: Errors, yardstick: Errors | None, dtype: torch.dtype) -> list[str]:
    """Which errors exceed twice the plain form's plus a slack; nothing that is not a number passes."""
    found = []
    for name, error in ours.items():
        # The errors of the rows may cancel in the plain form's mean by luck, so a row's bounds the mean's too.
        bounding = "nll" if name == "loss" else name
        allowed = _WITHOUT_YARDSTICK[dtype] if yardstick is None else 2.0 * yardstick[bounding] + SLACK
        if not error <= allowed:
            found.append(f"error of {name} is {error:.3g}, allowed {allowed:.3g}")
    return found


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    if leaf.grad is None:
        raise RuntimeError("no gradient reached the inputs")
    return leaf.grad


def _row_weight(inputs: Inputs, task: str) -> torch.Tensor:
    """float64 [N], the gradient of the task's scalar with respect to each row's loss."""
    if task == "per_token":
        return inputs.upstream.double()
    return torch.full_like(inputs.upstream, 1.0 / len(inputs.target), dtype=torch.float64)


def _distance(actual: torch.Tensor, wanted: torch.Tensor, row_weight: torch.Tensor | None) -> tuple[float, float]:
    """(relative Frobenius error, largest error over largest element) of actual and row_weight * wanted."""
    chunk = max(1, _CHUNK_BYTES[actual.device.type] // (8 * actual.shape[1]))
    squares = [0.0, 0.0]
    largest = [torch.zeros((), dtype=torch.float64, device=actual.device)] * 2
    for first in range(0, len(actual), chunk):
        rows = slice(first, first + chunk)
        part = wanted[rows] if row_weight is None else wanted[rows] * row_weight[rows, None]
        part = part.to(actual.device)
        for index, tensor in enumerate((actual[rows].double() - part, part)):
            squares[index] += tensor.square().sum().item()
            largest[index] = torch.maximum(largest[index], tensor.abs().max())
    # A gradient of nothing but zeros is met by zeros only.
    tiny = 5e-324
    return math.sqrt(squares[0]) / max(math.sqrt(squares[1]), tiny), (largest[0] / largest[1].clamp(min=tiny)).item()
