"""What is asked for, checked."""
