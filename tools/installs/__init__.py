"""Checks without a GPU that the documented ways to install keep what a machine has, by pip's dry run."""
