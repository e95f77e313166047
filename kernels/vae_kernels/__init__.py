"""Fused operations for text VAEs: Triton kernels on GPUs, tuned torch elsewhere, one signature for both.

Needs torch; Triton only when a Triton kernel is used. See ../README.md for the mathematics.
"""

from vae_kernels.backend import resolve_backend
from vae_kernels.embedding_word_dropout import embedding_word_dropout
from vae_kernels.gaussian_rsample_kl import GaussianSample, gaussian_rsample_kl
from vae_kernels.linear_cross_entropy import linear_cross_entropy
from vae_kernels.philox import philox_normal, philox_uniform
from vae_kernels.segment_sum import segment_sum
from vae_kernels.vocab_parallel_linear_cross_entropy import vocab_parallel_linear_cross_entropy

__all__ = [
    "GaussianSample",
    "embedding_word_dropout",
    "gaussian_rsample_kl",
    "linear_cross_entropy",
    "philox_normal",
    "philox_uniform",
    "resolve_backend",
    "segment_sum",
    "vocab_parallel_linear_cross_entropy",
]
