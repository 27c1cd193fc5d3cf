"""From a dataset to packs."""
