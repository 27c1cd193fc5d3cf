"""Files that come out."""
