"""The transformer and its runtime on one device or under context parallelism."""
