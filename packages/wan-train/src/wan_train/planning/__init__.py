"""Memory and step time of a run."""
