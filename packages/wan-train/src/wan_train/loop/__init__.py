"""The training run and its steps."""
