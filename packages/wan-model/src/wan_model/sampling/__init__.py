"""Sampling without a runtime: settings, solvers and the loop; the caller evaluates the model."""
