"""Distill guidance: objective, adapters, data, the training loop and its checkpoints."""
