"""The three models that are timed, as overrides of our configuration."""

from __future__ import annotations


def lstm(embedding_dim: int, hidden_dim: int) -> tuple[str, ...]:
    """Encoder and decoder of one layer of this width."""
    part = f"{{kind: lstm, hidden_dim: {hidden_dim}}}"
    return f"model.embedding_dim={embedding_dim}", f"model.encoder={part}", f"model.decoder={part}"


def _transformer(width: int, num_layers: int, num_heads: int) -> tuple[str, ...]:
    part = f"{{kind: transformer, hidden_dim: {width}, num_layers: {num_layers}, num_heads: {num_heads}}}"
    return f"model.embedding_dim={width}", f"model.encoder={part}", f"model.decoder={part}"


MODELS: dict[str, tuple[str, ...]] = {
    # Published size: Bowman 2016, He 2019, Li 2019 on PTB.
    "lstm_256": lstm(256, 256),
    "lstm_1024": lstm(512, 1024),
    "transformer_512": _transformer(512, 6, 8),
}
"""Name -> overrides of `model`."""
