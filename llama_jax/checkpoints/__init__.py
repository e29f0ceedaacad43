"""Checkpoints in and out: Hugging Face directories, safetensors, Orbax."""
