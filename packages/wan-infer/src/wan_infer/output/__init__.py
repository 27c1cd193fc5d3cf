"""Output files: videos, pictures, contact sheets."""
