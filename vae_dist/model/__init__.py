"""Encoders, latent, decoders and the VAE composed of them: torch only."""
