"""Videos and prompts to latents and back."""

from wan_model.codec.latent_codec import LatentCodec

__all__ = ["LatentCodec"]
