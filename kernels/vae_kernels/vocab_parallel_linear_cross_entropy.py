"""`linear_cross_entropy` with the vocabulary cut over the ranks of a process group (tensor parallelism).

Each rank holds the rows of `weight` of its words and all of x. A row's loss needs two numbers of each rank: the
logsumexp over its words without the target, and the target's logit where it has it. They travel in one all-gather of
two floats a token (three with label smoothing); backward has one all-reduce, of x's gradient.

Source: the idea of gathering pieces of an online softmax once, in place of three reductions, is NVIDIA Transformer
Engine's; the sharding is Megatron-LM's (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from vae_kernels.autograd import first_order_only
from vae_kernels.backend import on_device_of, resolve_backend
from vae_kernels.linear_cross_entropy import check_head, in_autocast_dtype, needs_gradient
from vae_kernels.linear_cross_entropy_ops import empty_gradients, implementation, kept_rows, returned_gradients
from vae_kernels.linear_cross_entropy_options import Head, LossOptions, wide
from vae_kernels.linear_cross_entropy_rows import RowTerms, complete_kept, gradients, regularised, sweep_rows

Tensor = torch.Tensor


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    first_word: int,
    total_vocab: int,
    group: dist.ProcessGroup,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_saved_bytes: int = 2**31,
    backend: str = "auto",
) -> Tensor:
    """Loss of each row, [N], the same on all ranks; float32 (float64 for float64 inputs), in nats. Collective.

    The gradient of x is the whole one on every rank; those of weight and bias are of the rank's words. Every rank must
    bring the same x, target, options and upstream gradient.

    Args:
        x: [N, H].
        weight: [words of this rank, H].
        target: int64 [N], numbers in the whole vocabulary, or ignore_index.
        first_word: number, in the whole vocabulary, of this rank's first word; the ranks' shares must adjoin.
        total_vocab: words of all ranks.
        group: the ranks that share the vocabulary.
        bias: [words of this rank].

    The rest is as in `linear_cross_entropy`.

    Raises:
        TypeError, ValueError: dtypes, shapes, shares or options that do not fit.
        IndexError: a target outside the whole vocabulary (found on the CPU only).
    """
    options = LossOptions.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    x = in_autocast_dtype(x)
    check_head(x, weight, target, bias, max_saved_bytes)
    if not 0 <= first_word <= total_vocab - weight.shape[0]:
        raise ValueError(
            f"words {first_word} to {first_word + weight.shape[0]} of this rank are not among {total_vocab} in all"
        )
    gradient_wanted = any(needs_gradient(tensor) for tensor in (x, weight, bias))
    return _rows(
        x, weight, bias, target, [first_word, total_vocab], options.numbers(),
        max_saved_bytes if gradient_wanted else 0, resolve_backend(backend, x), group.group_name,
    )[0]  # fmt: skip


@torch.library.custom_op("vae_kernels::vocab_parallel_linear_cross_entropy", mutates_args=())
def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    shard: list[int],
    options: list[float],
    max_saved_bytes: int,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll [N]; the row terms [4, N], the reference of which is this rank's; what is kept of the first rows).

    `shard` is (first word, total vocabulary).
    """
    with on_device_of(x):
        chosen = implementation(backend)
        head = chosen.prepared(_shard(x, weight, bias, target, shard, options))
        kept_KV = kept_rows(x, weight, options, max_saved_bytes, backend)
        kept = kept_KV if len(kept_KV) else None
        own_N = (head.target_N >= 0) & ~head.ignored_N
        logit_N = chosen.target_logits(head)
        reference_N = logit_N.masked_fill(head.ignored_N, float("inf"))
        rest_N, logit_sum_N = sweep_rows(head, chosen, reference_N, kept)
        log_rest_N = torch.log(rest_N) + reference_N.masked_fill(head.ignored_N, 0.0)
        pieces = [log_rest_N, logit_N.masked_fill(~own_N, float("-inf"))]
        pieces += [logit_sum_N] if head.options.label_smoothing else []
        gathered = _gather(torch.stack(pieces), group)
        nll_N, terms = _combine(head, gathered[:, 0], gathered[:, 1], reference_N)
        complete_kept(head, chosen, terms, kept)
        all_sum_N = gathered[:, 2].sum(0) if head.options.label_smoothing else logit_sum_N
        return regularised(head, nll_N, terms, all_sum_N), torch.stack(terms), kept_KV


@_rows.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shard: list[int], *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *kept_settings, _ = settings
    nll_N = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    return nll_N, nll_N.new_empty(4, x.shape[0]), kept_rows(x, weight, *kept_settings)


@torch.library.custom_op("vae_kernels::vocab_parallel_linear_cross_entropy_backward", mutates_args=())
def _rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Tensor,
    kept: Tensor,
    needs: list[bool],
    shard: list[int],
    options: list[float],
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, of all ranks' words; weight; bias) for upstream gradients [N]."""
    with on_device_of(x):
        chosen, kept_KV = implementation(backend), kept if len(kept) else None
        head = chosen.prepared(_shard(x, weight, bias, target, shard, options))
        found = gradients(head, chosen, RowTerms(*terms), grad, tuple(needs), weight.dtype, kept_KV)
        if found[0] is not None:
            # Summed wide: a rank's part may cancel another's.
            whole = found[0].to(wide(x.dtype))
            dist.all_reduce(whole, group=_resolve_process_group(GroupName(group)))
            found = (whole.to(x.dtype), *found[1:])
    return returned_gradients(found, x, bias)


@_rows_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Tensor,
    kept: Tensor,
    needs: list[bool],
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, bias, needs)


def _shard(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shard: list[int], options: list[float]
) -> Head:
    """The head of this rank's words: targets of other ranks are -1."""
    first_word, total_vocab = shard
    head = Head.of(x, weight, bias, target, LossOptions.of(options), total_vocab)
    local_N = head.target_N - first_word
    here_N = (local_N >= 0) & (local_N < weight.shape[0])
    return dataclasses.replace(head, target_N=torch.where(here_N, local_N, -1))


def _combine(head: Head, log_rest_RN: Tensor, target_logit_RN: Tensor, reference_N: Tensor) -> tuple[Tensor, RowTerms]:
    """(-log p(target) [N], terms) from what the R ranks know."""
    target_logit_N = target_logit_RN.amax(0).masked_fill(head.ignored_N, 0.0)
    # log(1 + rest) and 1 - p(target) for the odds of all ranks' words together.
    log_rest_N = torch.logsumexp(log_rest_RN, 0).masked_fill(head.ignored_N, float("-inf"))
    log_odds_N = log_rest_N - target_logit_N
    nll_N = torch.nn.functional.softplus(log_odds_N, threshold=40.0)
    # Not target_logit + nll, which cancels where the target is hopeless.
    lse_N = torch.logaddexp(target_logit_N, log_rest_N)
    return nll_N, RowTerms(lse_N, torch.sigmoid(log_odds_N), target_logit_N, reference_N)


def _gather(pieces: Tensor, group: str) -> Tensor:
    """[ranks, *shape of pieces]."""
    process_group = _resolve_process_group(GroupName(group))
    ranks = dist.get_world_size(process_group)
    # gloo wants the ranks' pieces along the first dimension.
    gathered = pieces.new_empty(ranks * pieces.shape[0], *pieces.shape[1:])
    dist.all_gather_into_tensor(gathered, pieces.contiguous(), group=process_group)
    return gathered.view(ranks, *pieces.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, target, shard, options, _, backend, group = inputs
    _, terms, kept = output
    ctx.save_for_backward(x, weight, bias, target, terms, kept)
    ctx.settings = shard, options, backend, group
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(terms, kept)


@first_order_only
def _derivative(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:3])
    found = _rows_backward(grad.contiguous(), *ctx.saved_tensors, needs, *ctx.settings)
    return (*(part if needed else None for part, needed in zip(found, needs, strict=True)), *(None,) * 6)


_rows.register_autograd(_derivative, setup_context=_context)
