"""DeepSpeed: the engine's configuration, and reading and writing its named, unsharded state.

Parameters are fp32 and autocast computes in bf16, so master weights, gradients, accumulation and reduction
are fp32 at every ZeRO stage, including stage 0, which DeepSpeed's own bf16 mode does not offer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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
from vae_dist.config.schema import ClusterConfig
from vae_dist.engine.checkpoint_files import NamedState
from vae_dist.errors import MachineError
from vae_dist.estimate.memory import BUCKET_ELEMENTS
from vae_dist.model.parameter_groups import parameter_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_engine(
    module: nn.Module, optimizer: OptimizerConfig, cluster: ClusterConfig, batch_sequences: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """Wrap the objective in a DeepSpeed engine with AdamW or SGD.

    Every DeepSpeed default that changed between 0.19 releases is set here. Accumulation boundaries and the
    learning rate are set by `step.py`.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_build_optimizer(module, optimizer),
        config={
            "train_batch_size": batch_sequences,
            "train_micro_batch_size_per_gpu": batch_sequences // world_size,
            "gradient_accumulation_steps": 1,
            # At stage 0 the step clips (`engine/gradients.py`).
            "gradient_clipping": optimizer.gradient_clip_norm if cluster.zero_stage else 0.0,
            "zero_optimization": _zero_options(cluster, sum(p.numel() for p in module.parameters())),
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW runs on processors, too.
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**31 - 1,
            "wall_clock_breakdown": False,
        },
    )
    _zero_optimizer_state(engine)
    return engine


def _zero_options(cluster: ClusterConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`.

    Raises:
        MachineError: this machine's processors cannot do it.
    """
    if (cluster.quantized_weights or cluster.quantized_gradients) and not torch.cuda.is_available():
        raise MachineError(
            "cluster.quantized_weights and cluster.quantized_gradients need GPUs: DeepSpeed has their kernels for CUDA "
            "alone. Set both to false."
        )
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "stage": cluster.zero_stage,
        "overlap_comm": cluster.overlap_communication,
        "contiguous_gradients": True,
        # Allocated whole whatever the model's size: 2 GB by default.
        "reduce_bucket_size": min(BUCKET_ELEMENTS, parameters),
        "zero_hpz_partition_size": cluster.hpz_ranks,
        "zero_quantized_weights": cluster.quantized_weights,
        "zero_quantized_gradients": cluster.quantized_gradients,
        **({"offload_optimizer": host} if cluster.offload_optimizer else {}),
        **({"offload_param": host} if cluster.offload_parameters else {}),
    }


def _build_optimizer(module: nn.Module, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(module, optimizer.weight_decay)
    # DeepSpeed's ZeRO-3 makes a dummy optimizer step while it starts: at learning rate 0 it changes nothing.
    if optimizer.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, fused=True)
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optimizer.epsilon, fused=True)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of the next update in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def named_state(engine: deepspeed.DeepSpeedEngine, share: int = 0, shares: int = 1) -> Iterator[NamedState]:
    """The whole state of every `shares`-th parameter and buffer, from number `share` on, copied to the host.

    Collective where the state is sharded: all ranks iterate together, each with a share of its own.
    """
    sharded = engine.zero_optimization_stage() > 0
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        mine = number % shares == share
        if not mine and not sharded:
            continue
        # Gathered one at a time: no device holds the whole state.
        slots = {m: _copied(_get(engine, parameter, m), mine) for m in _moments(engine, parameter)}
        weight = _copied(_get(engine, parameter, None), mine)
        if mine:
            if slots:
                slots["step"] = torch.tensor(_optimizer_step(engine, parameter))
            yield NamedState(name, weight, slots)
    for number, (name, buffer) in enumerate(_buffers(engine)):
        if number % shares == share:
            yield NamedState(name, _copied(buffer), {})


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All float32 weights and buffers, unsharded, on the host of every rank. Collective."""
    weights = {name: _copied(_get(engine, p, None)) for name, p in engine.module.named_parameters()}
    return weights | {name: _copied(b) for name, b in _buffers(engine)}


def load_state(engine: deepspeed.DeepSpeedEngine, states: Mapping[str, NamedState]) -> None:
    """Overwrite weights, buffers and moments with `states`, sharding as the engine's stage and world size ask."""
    steps: dict[str, float] = {}
    for name, parameter in engine.module.named_parameters():
        state = states[name]
        _set(engine, parameter, None, state.weight)
        for moment in _moments(engine, parameter):
            _set(engine, parameter, moment, state.slots[moment])
        if "step" in state.slots:
            steps[name] = float(state.slots["step"])
    for name, buffer in _buffers(engine):
        buffer.copy_(states[name].weight)
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


def _copied(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """A float32 copy on the host; nothing is copied where it is not wanted."""
    return tensor.detach().to("cpu", torch.float32, copy=True) if wanted else torch.empty(0)


def optimizer_state_elements(engine: deepspeed.DeepSpeedEngine) -> int:
    """Elements of one Adam moment held by this rank: the whole model at stage 0, a shard above."""
    return sum(slot["exp_avg"].numel() for slot in _inner_optimizer(engine).state.values() if "exp_avg" in slot)


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
