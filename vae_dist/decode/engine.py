"""Continuous batching: one decoder step for all rows, which join and leave between steps. Pure torch, one thread.

Shapes: S slots, V vocabulary, D latent, T tokens.

A request has a slot until it ends. What it gets there is the same, bit for bit, in every slot and in any company:

- its random numbers are a counter-based function of (seed, position);
- the decoder and the choice of tokens treat rows as strangers;
- a step always has one of a few shapes: a number of rows, and a span that attention looks back over. Matrix products
  of different shapes may differ in the last bits, so an engine tries its shapes once, before its first step, and uses
  only those whose rows have exactly the bits of the largest.

The promise is for one model, one kind of machine with one number of threads, and one number of slots.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.decode.choose import Chooser, is_greedy
from vae_dist.decode.request import Decoding, Emitted, FinishReason, Generated, Request
from vae_dist.errors import DataError, OverloadedError
from vae_dist.model.vae import TextVAE
from vae_kernels import philox_uniform

TOKEN_STREAM = 4
SLOTS = 64
# Not one row, for which libraries have kernels of their own: in bfloat16 rounding hides from most trials that these
# add up in another order.
_ROWS = (8,)
_SPANS = (32, 64, 128, 256, 512)
_KEY = torch.zeros(2, dtype=torch.int64)


@dataclass
class _Row:
    """A request in its slot. `position` is that of the token which the next step gives."""

    handle: int
    request: Request
    uniform: list[float]
    position: int
    tokens: list[int] = field(default_factory=list)

    @property
    def next_uniform(self) -> float:
        """Of a greedy row, or where a prefix is read, anything."""
        return self.uniform[self.position] if self.uniform and self.position >= 0 else 0.0


class DecodeEngine:
    """Decodes requests as they come. Not thread-safe: one thread calls it.

    Args:
        vae: in eval mode.
        max_tokens: the longest request.
        slots: requests that are decoded at a time.
        queue: requests that may wait for a slot.
        token_budget: most tokens that all requests, waiting and decoded, may still ask for; default: what fills slots
            and queue.
        dtype: what the decoder computes in, with weights cast once; default: the model's own. In bfloat16 the logits
            are rounded to eight bits.
    """

    def __init__(
        self,
        vae: TextVAE,
        max_tokens: int,
        *,
        slots: int = SLOTS,
        queue: int = 1024,
        token_budget: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_tokens, self.slots, self.queue = max_tokens, slots, queue
        self.token_budget = (slots + queue) * max_tokens if token_budget is None else token_budget
        self._vae = cast_for_decoding(vae, dtype)
        self._device = vae.output_bias.device
        self._dtype = self._vae.output_bias.dtype
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: dict[int, _Row] = {}
        self._owed, self._handles = 0, 0
        with torch.inference_mode():
            self._z_STD = torch.zeros(
                slots, max_tokens if vae.per_token else 1, vae.latent_dim, dtype=self._dtype, device=self._device
            )
            self._state = self._vae.decoder.new_state(slots, max_tokens)
        self._chooser: tuple[list[Decoding], Chooser] | None = None
        self.row_shapes, self.span_shapes = self._equal_shapes()

    def submit(self, request: Request) -> int:
        """Queue a request of at least one token; returns its handle.

        Raises:
            DataError: it asks for no token, or for more than the engine has room for.
            OverloadedError: the queue is full, or the token budget is spent.
        """
        limit = request.limit
        if not 1 <= limit <= self.max_tokens:
            raise DataError(f"A row of {limit} tokens was asked for, and there is room for 1 to {self.max_tokens}.")
        if not self.has_room_for(request):
            raise OverloadedError(
                f"{len(self._rows)} requests are being decoded and {len(self._waiting)} wait, with {self._owed} tokens "
                f"to come; there is room for {self.queue} waiting and {self.token_budget} tokens. Ask again later."
            )
        self._handles += 1
        self._owed += limit
        self._waiting.append((self._handles, request))
        return self._handles

    def cancel(self, handle: int) -> bool:
        """Forget a request, whose slot is free at once; whether there was one of that handle."""
        for slot, row in self._rows.items():
            if row.handle == handle:
                self._leave(slot)
                return True
        for waiting in self._waiting:
            if waiting[0] == handle:
                self._waiting.remove(waiting)
                self._owed -= waiting[1].limit
                return True
        return False

    def has_room_for(self, request: Request) -> bool:
        """Whether `submit` takes it now."""
        places = self.slots - len(self._rows) + self.queue
        return len(self._waiting) < places and self._owed + request.limit <= self.token_budget

    @property
    def idle(self) -> bool:
        """Whether there is nothing to decode."""
        return not self._rows and not self._waiting

    @property
    def active(self) -> int:
        """Slots that are in use."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Emitted]:
        """Advance every slot's request by one token, after those that wait have taken the free slots.

        A request with a prefix gives nothing at its first step.
        """
        self._admit()
        if not self._rows:
            return []
        used = max(self._rows) + 1
        count = next(rows for rows in self.row_shapes if rows >= used)
        rows = [self._rows.get(slot) for slot in range(count)]
        positions = [self._vae.decoder.first_position if row is None else row.position for row in rows]
        inputs = [row.tokens[-1] if row is not None and row.tokens else BOS_ID for row in rows]
        logits_SV = self._logits(inputs, positions)
        uniform_S = self._tensor([0.0 if row is None else row.next_uniform for row in rows])
        written = [[] if row is None else row.tokens for row in rows]
        token_S, log_prob_S = self._chooser_for(rows)(logits_SV, uniform_S, written)
        # float32: the last bits of float64 are not promised.
        tokens, log_probs = token_S.tolist(), log_prob_S.float().tolist()
        emitted = []
        for slot, row in enumerate(rows):
            if row is None:
                continue
            row.position += 1
            # At its first position a prefix was read.
            if row.position > 0:
                emitted.append(self._emit(slot, row, tokens[slot], log_probs[slot]))
        return emitted

    def run(self, requests: Iterable[Request]) -> list[Generated]:
        """Decode requests to their ends, in their order; those of no tokens give none. Nothing else may be going on."""
        parts: dict[int, list[Emitted]] = {}
        order: list[int | None] = []
        rest = iter(requests)
        upcoming = next(rest, None)
        while upcoming is not None or not self.idle:
            while upcoming is not None and len(self._waiting) < self.slots and self.has_room_for(upcoming):
                order.append(self.submit(upcoming) if upcoming.limit else None)
                upcoming = next(rest, None)
            for one in self.step():
                parts.setdefault(one.handle, []).append(one)
        return [Generated.of(parts[handle]) if handle is not None else Generated([], 0.0, False) for handle in order]

    def _admit(self) -> None:
        free = [slot for slot in range(self.slots) if slot not in self._rows] if self._waiting else []
        joining = [(slot, *self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        if not joining:
            return
        noise = iter(_uniforms([request for _, _, request in joining if not is_greedy(request.decoding)]))
        for slot, handle, request in joining:
            uniform = [] if is_greedy(request.decoding) else next(noise)
            self._rows[slot] = _Row(handle, request, uniform, self._vae.decoder.first_position)
        for slot, _, request in joining:
            z_TD = request.z if request.z.dim() == 2 else request.z[None]
            z_TD = z_TD[: self._z_STD.shape[1]]
            self._z_STD[slot, : len(z_TD)] = z_TD

    def _leave(self, slot: int) -> None:
        row = self._rows.pop(slot)
        self._owed -= row.request.limit - len(row.tokens)

    def _emit(self, slot: int, row: _Row, token: int, log_prob: float) -> Emitted:
        row.tokens.append(token)
        self._owed -= 1
        finish: FinishReason | None = None
        if token == EOS_ID:
            finish = "stop"
        elif row.position >= row.request.limit:
            finish = "length"
        if finish is not None:
            self._leave(slot)
        return Emitted(row.handle, token, log_prob, finish)

    def _logits(self, tokens: list[int], positions: list[int], span: int | None = None) -> torch.Tensor:
        """[S, V] of the first slots, as many as there are tokens."""
        count = len(tokens)
        position_S = self._tensor(positions)
        if self._z_STD.shape[1] == 1:
            z_SD = self._z_STD[:count, 0]
        else:
            z_SD = self._z_STD[torch.arange(count, device=self._device), position_S.clamp(min=0)]
        span = span or next(one for one in self.span_shapes if one > max(positions))
        return self._vae.step(self._tensor(tokens), z_SD, [part[:count] for part in self._state], position_S, span)

    def _chooser_for(self, rows: Sequence[_Row | None]) -> Chooser:
        """Kept as long as the options stay the same. An empty slot chooses as the first request does: at no cost."""
        first = next(row.request.decoding for row in rows if row is not None)
        options = [first if row is None else row.request.decoding for row in rows]
        if self._chooser is None or self._chooser[0] != options:
            self._chooser = options, Chooser(options, self._device)
        return self._chooser[1]

    def _tensor(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    @torch.inference_mode()
    def _equal_shapes(self) -> tuple[list[int], list[int]]:
        """Numbers of rows, and spans, whose steps have the bits of all slots and the whole span; the largest last."""
        row_shapes, spans = [rows for rows in _ROWS if rows < self.slots], [self.max_tokens]
        for span in [self.max_tokens, *(span for span in reversed(_SPANS) if span < self.max_tokens)]:
            whole = self._trial(self.slots, self.max_tokens, span - 1)
            if span < self.max_tokens:
                if not torch.equal(self._trial(self.slots, span, span - 1), whole):
                    continue
                spans.insert(0, span)
            row_shapes = [
                rows for rows in row_shapes if torch.equal(self._trial(rows, span, span - 1), whole[:, :rows])
            ]
        for part in (self._z_STD, *self._state):
            part.zero_()
        return [*row_shapes, self.slots], spans

    def _trial(self, rows: int, span: int, position: int) -> torch.Tensor:
        """Logits of a beginning, of a step at `position` and of one on the way; the past is the same at each trial."""
        steps = []
        for at, seed in ((self._vae.decoder.first_position, 1), (position, 1), (position // 2, 2)):
            for part in (self._z_STD, *self._state):
                part.uniform_(-1.0, 1.0, generator=torch.Generator(self._device).manual_seed(seed))
            tokens = [(7919 * (slot + 1)) % self._vae.vocab_size for slot in range(rows)]
            steps.append(self._logits(tokens, [at] * rows, span))
        return torch.stack(steps)


def generate(
    vae: TextVAE,
    z: torch.Tensor,
    seeds: Sequence[int],
    decoding: Decoding,
    lengths: Sequence[int] | None = None,
) -> list[Generated]:
    """Decode latents to tokens with an engine of their own; see `requests_of` for the arguments."""
    requests = requests_of(z, seeds, decoding, lengths)
    return DecodeEngine(vae, max(1, decoding.max_tokens)).run(requests)


def requests_of(
    z: torch.Tensor, seeds: Sequence[int], decoding: Decoding, lengths: Sequence[int] | None = None
) -> list[Request]:
    """A request for each row.

    Args:
        z: float32 latents [B, D], or [B, T, D] with one for each token, of which there are then at most T.
        seeds: one per row.
        decoding: how tokens are chosen.
        lengths: most tokens of each row, where every token has a latent and rows have more or fewer of them.
    """
    cut = [row[:length] for row, length in zip(z, lengths, strict=True)] if lengths is not None else list(z)
    return [Request(row, seed, decoding) for row, seed in zip(cut, seeds, strict=True)]


def _uniforms(requests: Sequence[Request]) -> list[list[float]]:
    """The random numbers of sampled requests, one a token."""
    if not requests:
        return []
    seed_R1 = torch.tensor([request.seed for request in requests], dtype=torch.int64)[:, None]
    position_T = torch.arange(max(request.limit for request in requests))
    found: list[list[float]] = philox_uniform(_KEY, seed_R1, position_T, stream=TOKEN_STREAM).tolist()
    return found


def cast_for_decoding(vae: TextVAE, dtype: torch.dtype | None) -> TextVAE:
    """What decoding needs of a model, in another dtype; the model itself where none is given."""
    if dtype is None:
        return vae
    kept = copy.copy(vae)
    kept._modules = {**vae._modules, "encoder": None, "posterior": None, "prior": None, "sampling_prior": None}
    return copy.deepcopy(kept).to(dtype)
