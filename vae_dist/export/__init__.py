"""The exported model directory: safetensors and JSON, no pickle."""
