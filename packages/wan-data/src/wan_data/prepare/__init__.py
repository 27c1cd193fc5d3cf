"""From source videos to an encoded dataset."""
