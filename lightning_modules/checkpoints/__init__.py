"""Checkpoints: how they are written and read, which are refused, and what they may build."""
