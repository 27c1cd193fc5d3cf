"""Looking at a dataset."""
