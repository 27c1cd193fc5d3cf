"""Packs for the training loop."""
