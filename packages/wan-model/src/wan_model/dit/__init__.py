"""The transformer and what it runs on."""
