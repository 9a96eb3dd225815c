"""Gaussian mixtures by exact, streaming EM."""
