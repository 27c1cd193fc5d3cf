"""Saves, resume and export."""
