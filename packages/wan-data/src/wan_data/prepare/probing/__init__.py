"""Probing sources before anything is encoded: every one is decoded to its end."""
