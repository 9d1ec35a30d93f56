"""Checkpoints on disk: safetensors files that are hostile until checked, and outputs that are whole or not there."""
