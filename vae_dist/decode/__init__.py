"""Decoding: samplers and the batched decoder loop shared by CLI, tests and server. Pure torch."""
