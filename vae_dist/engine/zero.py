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

from vae_dist.config.objective_schema import OptimizerConfig
from vae_dist.engine.checkpoint_files import NamedState
from vae_dist.errors import MachineError
from vae_dist.model.prior import Prior

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
    """Wrap the objective in a DeepSpeed engine with AdamW or SGD.

    Every DeepSpeed default that changed between 0.19 releases is set here. Accumulation boundaries and the
    learning rate are set by the loop at each step.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_build_optimizer(module, optimizer),
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


def _build_optimizer(module: nn.Module, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    groups = _parameter_groups(module, optimizer.weight_decay)
    # DeepSpeed's ZeRO-3 makes a dummy optimizer step while it starts: at learning rate 0 it changes nothing.
    if optimizer.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optimizer.epsilon, fused=True)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of the next update in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def named_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[NamedState]:
    """Every parameter's whole state and every buffer, one at a time. Collective: all ranks iterate together."""
    for name, parameter in engine.module.named_parameters():
        slots = {moment: _to_host(_get(engine, parameter, moment)) for moment in _moments(engine, parameter)}
        if slots:
            slots["step"] = torch.tensor(_optimizer_step(engine, parameter))
        yield NamedState(name, _to_host(_get(engine, parameter, None)), slots)
    for name, buffer in _buffers(engine):
        yield NamedState(name, _to_host(buffer), {})


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All float32 weights and buffers, unsharded, on the host of every rank. Collective."""
    weights = {name: _to_host(_get(engine, p, None)).clone() for name, p in engine.module.named_parameters()}
    return weights | {name: _to_host(b).clone() for name, b in _buffers(engine)}


def load_state(engine: deepspeed.DeepSpeedEngine, states: dict[str, NamedState]) -> None:
    """Overwrite weights, buffers and moments with `states`, sharding as the engine's stage and world size ask."""
    for name, parameter in engine.module.named_parameters():
        _set(engine, parameter, None, states[name].weight)
        for moment in _moments(engine, parameter):
            _set(engine, parameter, moment, states[name].slots[moment])
    for name, buffer in _buffers(engine):
        buffer.copy_(states[name].weight)
    steps = {name: float(state.slots["step"]) for name, state in states.items() if "step" in state.slots}
    _set_optimizer_steps(engine, steps)
    _refresh_shards(engine)


def restart(engine: deepspeed.DeepSpeedEngine, fresh: dict[str, torch.Tensor]) -> None:
    """Begin the optimizer anew, and the parameters in `fresh` with these weights. Collective.

    The same as closing the engine and opening another one.
    """
    for name, parameter in engine.module.named_parameters():
        if name in fresh:
            _set(engine, parameter, None, fresh[name])
        for moment in _moments(engine, parameter):
            _set(engine, parameter, moment, torch.zeros_like(_get(engine, parameter, moment)))
    _set_optimizer_steps(engine, dict.fromkeys(dict(engine.module.named_parameters()), 0.0))
    _refresh_shards(engine)


def _buffers(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, torch.Tensor]]:
    """The buffers that belong to the weights: not those that a module makes anew, such as tables of positions."""
    kept = engine.module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in kept]


def _set_optimizer_steps(engine: deepspeed.DeepSpeedEngine, steps: dict[str, float]) -> None:
    """Adam's count of updates, by parameter at stage 0. Above it is one number: there parameters move together."""
    if engine.zero_optimization_stage() == 0:
        slots = {name: engine.optimizer.state.get(p, {}) for name, p in engine.module.named_parameters()}
    else:
        slots = dict(enumerate(_inner_optimizer(engine).state.values()))
    for name, slot in slots.items():
        if "step" in slot:
            slot["step"].fill_(steps.get(name, max(steps.values(), default=0.0)))


def _optimizer_step(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> float:
    if engine.zero_optimization_stage() == 0:
        return float(engine.optimizer.state[parameter]["step"])
    return max(float(slot["step"]) for slot in _inner_optimizer(engine).state.values())


def _refresh_shards(engine: deepspeed.DeepSpeedEngine) -> None:
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()


def _moments(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> tuple[str, ...]:
    """The names of what the optimizer keeps for a parameter: nothing for SGD or a frozen one."""
    is_adam = isinstance(_inner_optimizer(engine), torch.optim.AdamW)
    return _MOMENTS if is_adam and parameter.requires_grad else ()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def optimizer_state_elements(engine: deepspeed.DeepSpeedEngine) -> int:
    """Elements of one Adam moment held by this rank: the whole model at stage 0, a shard above."""
    return sum(slot["exp_avg"].numel() for slot in _inner_optimizer(engine).state.values() if "exp_avg" in slot)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on the matrices of layers only.

    Embeddings count as biases do, since a rare token must not fade away; so do the means, variances and pseudo-inputs
    of a prior, which are places and not maps.
    """
    spared = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    spared |= {id(p) for m in module.modules() if isinstance(m, Prior) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in (p for p in module.parameters() if p.requires_grad):
        (plain if parameter.ndim < 2 or id(parameter) in spared else decayed).append(parameter)
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
    if not isinstance(inner, torch.optim.AdamW):
        return
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
    stage = engine.zero_optimization_stage()
    if moment is not None:
        state = engine.optimizer.state if stage == 0 else None
        return state[parameter][moment] if state is not None else safe_get_full_optimizer_state(parameter, moment)
    if stage == 0 or (stage < 3 and not parameter.requires_grad):
        return parameter.data
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _set(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    value, stage = value.to(parameter.device), engine.zero_optimization_stage()
    if moment is not None:
        if stage == 0:
            engine.optimizer.state[parameter][moment].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
    elif stage == 0 or (stage < 3 and not parameter.requires_grad):
        parameter.data.copy_(value)
    elif parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value)
    else:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
