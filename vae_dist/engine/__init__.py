"""The training loop and what it stands on: DeepSpeed, checkpoints, signals. The only place that imports deepspeed."""
