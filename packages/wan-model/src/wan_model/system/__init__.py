"""Files, processes and units, shared by all four packages. Importing it imports no torch."""
