"""Videos while a run trains."""
