"""Statistics, verification and plots of a dataset."""
