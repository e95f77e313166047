"""Our training step as a run makes it: stream, DeepSpeed, schedules, metrics; in this process and without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vae_dist.config.load import load_config
from vae_dist.data.stream.batch import Batch, Share
from vae_dist.data.stream.training_data import open_training_data
from vae_dist.engine.plan import claim_run_dir, plan_run
from vae_dist.engine.start import start_run

PARTS = ("data", "encoder", "latent", "decoder", "loss", "backward", "optimizer", "logging", "other")
"""Parts of a step, in their order."""


class OurRun:
    """A training run that is advanced step by step.

    Attributes:
        dtype: of autocast, or None for fp32.
    """

    def __init__(
        self, data_dir: Path, storage: Path, name: str, overrides: Sequence[str], batch_sequences: int
    ) -> None:
        places = (f"data.dir={data_dir}", f"run.storage={storage}", f"run.name={name}")
        config = load_config(None, [*overrides, f"train.batch_sequences={batch_sequences}", "train.epochs=50", *places])
        plan = plan_run(config, open_training_data([str(data_dir)], config), [str(data_dir)], time.time())
        if dist.get_rank() == 0:
            claim_run_dir(plan, {})
        self.run = start_run(plan, torch.device("cpu"))
        self.dtype: torch.dtype | None = self.run.engine.module.autocast
        self._shares = self.run.stream.shares(0, plan.total_steps)
        self._spent: dict[str, float] | None = None

    @property
    def vae(self) -> nn.Module:
        """The model."""
        model: nn.Module = self.run.engine.module.vae
        return model

    def step(self) -> int:
        """What `engine/loop.py` does in a step that neither validates nor saves; the real tokens of its batch."""
        run = self.run
        with self._timed("data"):
            share: Share = next(self._shares)
            batches, _ = run.train_step.batches(share, should_stop=False)
        terms = run.train_step(run.step, batches, share.real_sequences)
        with self._timed("logging"):
            run.window.add(terms)
            run.step += 1
            if run.step % run.config.run.log_every_steps == 0:
                run.log()
        return int(share.sequences.lengths.sum())

    def split(self, steps: int) -> dict[str, float]:
        """Seconds a step spends in each of `PARTS`, the mean of `steps`."""
        hooks, begun = [], {}

        def before(part: str) -> None:
            begun[part] = time.perf_counter()

        def after(part: str) -> None:
            assert self._spent is not None
            self._spent[part] += time.perf_counter() - begun[part]

        vae, engine = self.run.engine.module.vae, self.run.engine
        # The loss: from the decoder's end to the end of the forward pass.
        for module, part in ((vae.encoder, "encoder"), (vae.posterior, "latent"), (vae.decoder, "decoder")):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: before(part)))
            hooks.append(module.register_forward_hook(lambda *_, part=part: after(part)))
        hooks.append(vae.decoder.register_forward_hook(lambda *_: before("loss")))
        hooks.append(vae.register_forward_hook(lambda *_: after("loss")))
        backward, update = engine.backward, engine.step
        engine.backward = _around(backward, lambda: before("backward"), lambda: after("backward"))
        engine.step = _around(update, lambda: before("optimizer"), lambda: after("optimizer"))
        self._spent = dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        try:
            for _ in range(steps):
                self.step()
            whole, spent = time.perf_counter() - start, self._spent
        finally:
            self._spent = None
            engine.backward, engine.step = backward, update
            for hook in hooks:
                hook.remove()
        spent["other"] = whole - sum(spent.values())
        return {part: seconds / steps for part, seconds in spent.items()}

    def next_batches(self, count: int) -> list[tuple[Batch, int]]:
        """The batches of the next steps, with their numbers of real sequences; for a bare step."""
        found = []
        for _ in range(count):
            share = next(self._shares)
            found.append((self.run.train_step.batches(share, should_stop=False)[0][0], share.real_sequences))
        return found

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._spent is not None:
            self._spent[part] += time.perf_counter() - start


def _around(function, before, after):  # type: ignore[no-untyped-def]
    def wrapped(*arguments, **named):  # type: ignore[no-untyped-def]
        before()
        result = function(*arguments, **named)
        after()
        return result

    return wrapped
