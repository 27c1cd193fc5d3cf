"""Videos and prompts to latents and back."""
