"""From videos with captions to shards of latents, and from shards to packed training batches."""

__version__ = "0.1.0"
