"""Weights and adapters."""
