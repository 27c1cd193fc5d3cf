"""From sources to an encoded dataset."""
