"""What a dataset knows of its sources: a table of them, appended to by each run that changes something."""
