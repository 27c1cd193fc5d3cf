"""What happens at a step."""
