"""Likelihood, latent diagnostics, n-gram baselines and text metrics."""
