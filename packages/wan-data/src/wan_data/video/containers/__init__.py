"""Video files: the stream that a player shows, its times, and whether anything is missing or damaged."""
