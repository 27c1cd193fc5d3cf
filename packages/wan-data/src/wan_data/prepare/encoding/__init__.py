"""Encoding planned sources, in this process or in several."""
