"""Hugging Face checkpoints and adapters, both ways."""
