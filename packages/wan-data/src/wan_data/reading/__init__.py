"""From a dataset to packed training batches."""
