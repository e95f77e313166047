"""FLOPs and activation bytes of one micro-batch: the training objective itself, run on tensors that have no data.

Whatever the model is made of is counted, without a formula of its own: torch's counter sees the matrix products, and
what is alive is known after every operator. Tensors without data stand for those of the CPU; a GPU differs in the
kernels for LSTM and attention (`fused_ops.py`) and takes the same types.

Shapes: B sequences, T positions, N = B T tokens, V vocabulary, E embedding.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from vae_dist.config.schema import Config, TrainConfig
from vae_dist.data.stream.batch import Batch
from vae_dist.estimate.fused_ops import FORMULAS, FusedKernels, lstm_scratch
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo
from vae_kernels import linear_cross_entropy
from vae_kernels.linear_cross_entropy_ops import implementation
from vae_kernels.linear_cross_entropy_options import Head, LossOptions

_FORMULAS = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry


class Shape(NamedTuple):
    """A micro-batch: sequences, all of them `tokens` long."""

    sequences: int
    tokens: int


class Cost(NamedTuple):
    """Of one micro-batch.

    Attributes:
        forward_flops, backward_flops: of the model; the fused loss forms its gradients in forward, but here they count
            as backward.
        recompute_flops: forward done again for activation checkpointing.
        kept_bytes: what forward leaves for backward.
        peak_bytes: most that is alive at once, the gradients a parameter has not yet been given included, besides
            parameters and their gradients.
        operators: that make something, forward and backward; an LSTM's count once for each position.
    """

    forward_flops: int
    backward_flops: int
    recompute_flops: int
    kept_bytes: int
    peak_bytes: int
    operators: int


class LossBytes(NamedTuple):
    """Of the softmax loss of one micro-batch.

    Attributes:
        kept: from forward to backward by the fused loss; also part of `Cost.kept_bytes`.
        workspace: that it needs for a moment.
        unfused: most that logits and softmax in torch's own operators would take.
    """

    kept: int
    workspace: int
    unfused: int


def micro_batch_cost(config: Config, vocab_size: int, shape: Shape, autocast: torch.dtype | None, gpu: bool) -> Cost:
    """Trace forward and backward of the objective."""
    cost = _trace(config, vocab_size, shape, autocast, gpu)
    if not config.train.activation_checkpointing:
        return cost
    without = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": False})})
    plain = _trace(without, vocab_size, shape, autocast, gpu)
    again = cost.backward_flops - plain.backward_flops
    return cost._replace(backward_flops=plain.backward_flops, recompute_flops=again)


def peak_bytes(config: Config, vocab_size: int, shape: Shape, autocast: torch.dtype | None, gpu: bool) -> int:
    """`Cost.peak_bytes` alone, which takes half the time where activations are recomputed."""
    return _trace(config, vocab_size, shape, autocast, gpu).peak_bytes


def loss_bytes(config: Config, vocab_size: int, shape: Shape, autocast: torch.dtype | None, gpu: bool) -> LossBytes:
    """What the loss takes, by itself, fused and not."""
    samples, width = config.objective.importance_samples, config.model.embedding_dim
    kept, unfused = _loss_bytes(samples, width, vocab_size, shape, autocast)
    # With several samples the logits of most rows are kept, and counted, already.
    workspace = _workspace_bytes(width, vocab_size, shape, autocast or torch.float32, gpu) if samples == 1 else 0
    return LossBytes(kept, workspace, unfused)


@lru_cache(maxsize=256)
def _loss_bytes(
    samples: int, width: int, vocab_size: int, shape: Shape, autocast: torch.dtype | None
) -> tuple[int, int]:
    """(kept by the fused loss, most by the unfused one)."""
    sequences, rows = samples * shape.sequences, samples * shape.sequences * shape.tokens
    with FakeTensorMode():
        x_NE = torch.empty(rows, width, dtype=autocast, requires_grad=True)
        weight_VE = torch.empty(vocab_size, width, requires_grad=True)
        bias_V = torch.empty(vocab_size, requires_grad=True)
        target_N, offsets = torch.empty(rows, dtype=torch.int64), torch.empty(sequences + 1, dtype=torch.int64)
        how: dict[str, Any] = (
            {"reduction": "sequence"} if samples > 1 else {"weight_per_sequence": torch.empty(sequences)}
        )

        def fused() -> torch.Tensor:
            scored = linear_cross_entropy(
                x_NE, weight_VE, target_N, bias=bias_V, cu_seqlens=offsets, backend="torch", **how
            )
            return scored.sum() if isinstance(scored, torch.Tensor) else scored[0]

        def unfused() -> torch.Tensor:
            return F.cross_entropy(F.linear(x_NE, weight_VE, bias_V), target_N, reduction="sum")

        leaves = (x_NE, weight_VE, bias_V)
        return _bytes_of(fused, leaves, autocast)[0], _bytes_of(unfused, leaves, autocast)[1]


def _workspace_bytes(width: int, vocab_size: int, shape: Shape, dtype: torch.dtype, gpu: bool) -> int:
    """Logits that are worked on together."""
    try:
        chosen = implementation("triton" if gpu else "torch")
    except ImportError:
        chosen = implementation("torch")
    rows = shape.sequences * shape.tokens
    with torch.device("meta"):
        x_NE, weight_VE = torch.empty(rows, width, dtype=dtype), torch.empty(vocab_size, width)
        target_N = torch.empty(rows, dtype=torch.int64)
        head = Head.of(x_NE, weight_VE, None, target_N, LossOptions.checked(-100, 0.0, 0.0, None, 1.0))
    at_once = min(rows, chosen.rows_at_once(head, kept=False))
    return at_once * chosen.row_pitch(vocab_size, dtype) * dtype.itemsize


def _bytes_of(
    loss: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], autocast: torch.dtype | None
) -> tuple[int, int]:
    """(kept after forward, most at once) of a loss of leaves."""
    for leaf in leaves:
        leaf.grad = torch.empty_like(leaf)
    with Meter() as meter:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            result = loss()
        kept = meter.now
        result.backward()
    return kept, meter.most


@lru_cache(maxsize=64)
def _trace_cached(text: str, vocab_size: int, shape: Shape, autocast: torch.dtype | None, gpu: bool) -> Cost:
    config = Config.model_validate_json(text)
    # Constants that some parts compute and keep must be numbers, not tensors without data: this makes them.
    with torch.device("meta"):
        TextVAE(config.model, vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = TextVAE(
            config.model, vocab_size, kernels="torch", activation_checkpointing=config.train.activation_checkpointing
        )
        objective = NegativeElbo(vae, config.objective, autocast).train()
        for parameter in objective.parameters():
            if parameter.requires_grad:
                # From the second micro-batch on they are there; the first must count no less.
                parameter.grad = torch.empty_like(parameter)
        batch, number = _batch(shape), torch.empty(())
        arguments = (batch, torch.empty(2, dtype=torch.int64), number, number, number)
        with warnings.catch_warnings(), FusedKernels(gpu), Meter(gpu) as meter:
            # They are said by the run itself.
            warnings.simplefilter("ignore")
            # The terms are looked at after backward.
            loss, _terms = objective(*arguments)
            in_forward, kept = sum(meter.flops.values()), meter.now
            loss.backward()
    forward = in_forward - _gradients_in_forward(meter, config.model.embedding_dim * vocab_size, shape)
    return Cost(forward, sum(meter.flops.values()) - forward, 0, kept, meter.most, meter.operators)


def _trace(config: Config, vocab_size: int, shape: Shape, autocast: torch.dtype | None, gpu: bool) -> Cost:
    defaults, recompute = TrainConfig(), config.train.activation_checkpointing
    train = defaults.model_copy(update={"activation_checkpointing": recompute})
    relevant = Config(model=config.model, objective=config.objective, train=train)
    return _trace_cached(relevant.model_dump_json(), vocab_size, shape, autocast, gpu)


def _gradients_in_forward(meter: Meter, head_elements: int, shape: Shape) -> int:
    """FLOPs of the fused loss with known weights that are gradients: all but those of the logits."""
    logits = 2 * shape.sequences * shape.tokens * head_elements
    return max(0, meter.flops[torch.ops.vae_kernels.linear_cross_entropy_weighted] - logits)


def _batch(shape: Shape) -> Batch:
    sequences, tokens = shape
    return Batch(
        tokens_BT=torch.empty(sequences, tokens, dtype=torch.int64),
        lengths_B=torch.empty(sequences, dtype=torch.int64),
        weight_B=torch.empty(sequences),
        sample_id_B=torch.empty(sequences, dtype=torch.int64),
        valid_N=torch.empty(sequences * tokens, dtype=torch.int64),
        offsets_B1=torch.empty(sequences + 1, dtype=torch.int64),
    )


class Meter(TorchDispatchMode):
    """Counts the FLOPs of the operators that run within, and the bytes of the storages that they make while those live.

    The formulas are those of torch's counter and ours. The counter itself holds on to tensors that pass modules.

    Attributes:
        flops: by operator.
        operators: that made storages; an LSTM's once for each position.
        now, most: bytes alive, and the most there were.
    """

    def __init__(self, gpu: bool = False) -> None:
        super().__init__()
        self.gpu = gpu
        self.flops: Counter[Any] = Counter()
        self.operators = self.now = self.most = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {s._cdata for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        result = function(*args, **(kwargs or {}))
        operator = function._overloadpacket
        if operator in _FORMULAS:
            self.flops[operator] += _FORMULAS[operator](*args, **(kwargs or {}), out_val=result)
        before = len(self._known)
        for storage in map(_storage, tree_leaves(result)):
            if storage is not None and storage._cdata not in given and storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        made = len(self._known) > before
        self.operators += _positions(operator, args) if made else 0
        self.most = max(self.most, self.now + self._scratch(operator, args))
        return result

    def _scratch(self, operator: Any, args: tuple[Any, ...]) -> int:
        """Bytes that an operator takes within itself, where they are worth a thought."""
        if self.gpu or operator is not torch.ops.vae_estimate.lstm_backward:
            return 0
        _, x, _, weight_ih, weight_hh, *_ = args
        return lstm_scratch(x.shape, weight_ih.shape, weight_hh.shape)

    def _freed(self, size: int) -> None:
        self.now -= size


def _positions(operator: Any, args: tuple[Any, ...]) -> int:
    """How many kernels one after the other an operator is."""
    where = {torch.ops.vae_estimate.lstm: 0, torch.ops.vae_estimate.lstm_backward: 1}.get(operator)
    return 1 if where is None else int(args[where].shape[0])


def _storage(thing: Any) -> torch.UntypedStorage | None:
    return thing.untyped_storage() if isinstance(thing, torch.Tensor) else None
