"""The files of a dataset: shards, manifest and Energon metadata."""
