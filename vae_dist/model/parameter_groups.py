"""Which parameters weight decay is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from vae_dist.model.prior import Prior


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as groups of a torch optimizer: weight decay on the matrices of layers only.

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
