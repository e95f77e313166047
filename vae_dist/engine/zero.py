"""DeepSpeed: the engine's configuration, and reading and writing its named, unsharded state.

Parameters are fp32 and autocast computes in bf16, so master weights, gradients, accumulation and reduction
are fp32 at every ZeRO stage, including stage 0, which DeepSpeed's own bf16 mode does not offer.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.engine.checkpoint_files import NamedState
from vae_dist.errors import MachineError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def require_compiler() -> None:
    """DeepSpeed compiles its communication extension when it starts on CPUs; say early what that needs.

    Raises:
        MachineError: g++ or ninja is not on PATH.
    """
    # In a virtual environment that is not activated, ninja lies beside Python and not on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for tool, remedy in (("g++", "apt-get install g++"), ("ninja", "pip install ninja, or activate .venv")):
        if shutil.which(tool) is None:
            raise MachineError(
                f"DeepSpeed needs {tool} to compile an extension, and it is not on PATH of {socket.gethostname()}. "
                f"Run: {remedy}."
            )


def build_engine(
    module: nn.Module, optimizer: OptimizerConfig, zero_stage: int, batch_sequences: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """Wrap the objective in a DeepSpeed engine with AdamW.

    Every DeepSpeed default that changed between 0.19 releases is set here. Accumulation boundaries and the
    learning rate are set by the loop at each step.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's ZeRO-3 makes a dummy optimizer step while it starts: at learning rate 0 it changes nothing.
    adamw = torch.optim.AdamW(
        _parameter_groups(module, optimizer.weight_decay),
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        config={
            "train_batch_size": batch_sequences,
            "train_micro_batch_size_per_gpu": batch_sequences // world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimizer.gradient_clip_norm,
            "zero_optimization": {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**31 - 1,
            "wall_clock_breakdown": False,
        },
    )
    _zero_optimizer_state(engine)
    return engine


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of the next update in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def named_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[NamedState]:
    """Every parameter's whole state, one at a time. Collective: all ranks iterate together."""
    for name, parameter in engine.module.named_parameters():
        values = [_get(engine, parameter, key) for key in (None, *_MOMENTS)]
        yield NamedState(name, *(v.detach().float().cpu() for v in values))


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All float32 weights, unsharded, on the host of every rank. Collective."""
    return {
        name: _get(engine, parameter, None).detach().float().cpu().clone()
        for name, parameter in engine.module.named_parameters()
    }


def load_state(engine: deepspeed.DeepSpeedEngine, states: dict[str, NamedState], optimizer_step: int) -> None:
    """Overwrite weights and moments with `states`, sharding as the engine's stage and world size ask."""
    for name, parameter in engine.module.named_parameters():
        state = states[name]
        _set(engine, parameter, None, state.weight)
        _set(engine, parameter, "exp_avg", state.exp_avg)
        _set(engine, parameter, "exp_avg_sq", state.exp_avg_sq)
    for slot in _inner_optimizer(engine).state.values():
        slot["step"].fill_(optimizer_step)
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()


def optimizer_state_elements(engine: deepspeed.DeepSpeedEngine) -> int:
    """Elements of one Adam moment held by this rank: the whole model at stage 0, a shard above."""
    return sum(slot["exp_avg"].numel() for slot in _inner_optimizer(engine).state.values())


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; embeddings count as biases do: a rare token must not fade away."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        (plain if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _zero_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give every parameter its moments and step 0 now.

    Otherwise moments appear at the first step, too late to load a checkpoint, and ZeRO-3's dummy step would
    leave Adam's bias correction one step ahead of the other stages.
    """
    inner = _inner_optimizer(engine)
    slots = engine.optimizer.fp32_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else None
    parameters = slots or [p for group in inner.param_groups for p in group["params"]]
    for parameter in parameters:
        inner.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in _MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _get(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.data if moment is None else engine.optimizer.state[parameter][moment]
    return safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)


def _set(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    value = value.to(parameter.device)
    if engine.zero_optimization_stage() == 0:
        target = parameter.data if moment is None else engine.optimizer.state[parameter][moment]
        target.copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)
