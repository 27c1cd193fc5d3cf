"""From the command line to a configuration."""
