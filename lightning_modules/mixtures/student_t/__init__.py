"""Mixtures of multivariate t distributions, which outliers do not pull along."""
