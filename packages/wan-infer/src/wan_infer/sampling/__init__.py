"""Prompts to frames."""
