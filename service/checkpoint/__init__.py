"""Checkpoint files to one canonical config and state dict; the only package that knows foreign names."""
