"""One rank of a check of `linear_cross_entropy` under DeepSpeed: two steps in each case, gradients written by rank 0.

usage: row_loss_worker.py INPUTS OUT CASES.json, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae_dist.engine.compiler import require_compiler
from vae_kernels import linear_cross_entropy

LEARNING_RATE = 0.5


class Head(nn.Module):
    """Loss of each sequence; the weight may be another module's too."""

    def __init__(self, weight: nn.Parameter, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(bias)

    def forward(self, x_NH: torch.Tensor, target_N: torch.Tensor, offsets_B1: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            x_NH, self.weight, target_N, bias=self.bias, cu_seqlens=offsets_B1, reduction="sequence"
        )


class OutsideHead(nn.Module):
    """The same with a weight that belongs to another module alone and is read by the parent."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x_NH, target_N, offsets_B1, weight_VH):
        return linear_cross_entropy(
            x_NH, weight_VH, target_N, bias=self.bias, cu_seqlens=offsets_B1, reduction="sequence"
        )


class Model(nn.Module):
    """An embedding whose weight is also the head's, and a layer in between; gives (loss, nll [B])."""

    def __init__(self, inputs: dict[str, torch.Tensor], head: str) -> None:
        super().__init__()
        self.head_kind = head
        self.embedding = nn.Embedding.from_pretrained(inputs["embedding"].clone(), freeze=False)
        self.linear = nn.Linear(*inputs["linear"].shape[::-1], bias=False)
        self.linear.weight.data.copy_(inputs["linear"])
        bias = inputs["bias"].clone()
        self.head = OutsideHead(bias) if head == "outside" else Head(self.embedding.weight, bias)

    def forward(self, words_N, target_N, offsets_B1, upstream_B):
        x_NH = torch.tanh(self.linear(self.embedding(words_N)))
        if self.head_kind == "outside":
            nll_B = self.head(x_NH, target_N, offsets_B1, self.embedding.weight)
        elif self.head_kind == "checkpoint":
            # Reentrant checkpoints give a tied weight two gradients, which DeepSpeed refuses.
            nll_B = checkpoint(self.head, x_NH, target_N, offsets_B1, use_reentrant=False)
        else:
            nll_B = self.head(x_NH, target_N, offsets_B1)
        return (upstream_B * nll_B).sum(), nll_B.detach()


def main() -> None:
    inputs, out, cases = load_file(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    require_compiler()
    deepspeed.init_distributed("gloo")
    batch = [inputs[f"{name}-{dist.get_rank()}"] for name in ("words", "target", "offsets", "upstream")]
    for name, (stage, head, evaluates) in cases.items():
        engine = _engine(Model(inputs, head), stage)
        found: dict[str, torch.Tensor] = {}
        for step in range(2):
            engine.train()
            loss, _ = engine(*batch)
            # At stage 3 the weight must be gone when forward is over, or the case shows nothing.
            found[f"held-{step}"] = torch.tensor(engine.module.embedding.weight.numel())
            engine.backward(loss, scale_wrt_gas=False)
            found |= {f"{parameter}-{step}": g for parameter, g in _gradients(engine, stage).items()}
            engine.step()
            if evaluates:
                engine.eval()
                with torch.no_grad():
                    found[f"nll-{step}"] = engine(*batch)[1]
        if dist.get_rank() == 0:
            save_file(found, out / f"{name}.safetensors")
        engine.destroy()


def _engine(model: Model, stage: int) -> deepspeed.DeepSpeedEngine:
    # Nothing small enough to stay whole, nothing kept for its next use: every gap in what is gathered shows.
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        config={
            "train_batch_size": dist.get_world_size(),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**31 - 1,
        },
    )
    return engine


def _gradients(engine: deepspeed.DeepSpeedEngine, stage: int) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.grad if stage == 0 else safe_get_full_grad(parameter)).detach().float().clone()
        for name, parameter in engine.module.named_parameters()
    }


if __name__ == "__main__":
    main()
