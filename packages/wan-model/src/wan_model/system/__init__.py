"""What all four packages ask of the operating system: files, processes, units. Imports no torch by itself."""
