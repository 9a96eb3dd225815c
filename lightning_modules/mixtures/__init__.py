"""Mixtures and K-means by exact, streaming, multi-process EM."""
