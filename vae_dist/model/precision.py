"""Which dtype the matrix products run in."""

from __future__ import annotations

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (float32) for `precision`: auto, bf16 or fp32.

    `auto` is bf16 on GPUs that have it and on processors with AMX or AVX512-BF16, else fp32.
    """
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None
