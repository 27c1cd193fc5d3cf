"""Packs for the loop."""
