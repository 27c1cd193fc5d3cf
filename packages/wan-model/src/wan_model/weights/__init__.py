"""Loading and saving of weights."""
