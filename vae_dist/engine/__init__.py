"""The training loop and what it stands on: DeepSpeed, checkpoints. The only place that imports deepspeed."""
