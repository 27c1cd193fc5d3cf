"""The sampler: prompts in, videos out.

Shapes: B videos, T frames, H rows, W columns (pixels); C latent channels, F latent frames, h rows, w columns.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wan_infer.denoise import OnStep, denoise, draw_noise
from wan_infer.placement import Placement, at_work
from wan_infer.requests import NEGATIVE_PROMPT, Settings, SolverName, check_frames, check_size
from wan_infer.sources import ModelName, Transformer, load_codec, transformer_of_checkpoint, transformer_of_model
from wan_model.codec import LatentCodec


class WanSampler:
    """A transformer with its text encoder and its autoencoder, loaded once for any number of videos.

    ::

        sampler = WanSampler.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        video = sampler.sample(["a rabbit in a meadow"], width=832, height=480, frames=81, seed=42)[0]
        save_video(video, "rabbit.mp4")

    Args:
        transformer: see ``sources``.
        codec: with both halves, on the CPU.
        placement: devices and precision; the loaded weights have that precision already.
    """

    def __init__(self, transformer: Transformer, codec: LatentCodec, placement: Placement) -> None:
        self.transformer = transformer
        self.codec = codec
        self.placement = placement
        self.model = transformer.model.to(placement.home)
        codec.vae.to(placement.home)
        codec.text_encoder.to(placement.text_home)
        self._embeddings: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: ModelName,
        *,
        device: str = "auto",
        dtype: str = "auto",
        t5_cpu: bool = False,
        offload: bool = False,
        revision: str | None = None,
        vae_model: ModelName | None = None,
        text_model: ModelName | None = None,
    ) -> "WanSampler":
        """Released weights: a folder in diffusers' layout, or a hub id.

        Args:
            model: where the transformer is, and the rest unless the last two arguments say otherwise.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto`` (bfloat16 on CUDA, else float32), ``float32`` or ``bfloat16``.
            t5_cpu: embed prompts on the CPU.
            offload: have each part on the device only while it works.
            revision: of hub ids.
            vae_model: another model to take the autoencoder from.
            text_model: another model to take the text encoder and the tokenizer from.

        Raises:
            ValueError: something is missing, is of another model, or does not fit together.
        """
        placement = Placement.choose(device, dtype, t5_cpu=t5_cpu, offload=offload)
        transformer = transformer_of_model(model, dtype=placement.dtype, revision=revision)
        codec = load_codec(
            model,
            transformer,
            vae_model=vae_model,
            text_model=text_model,
            text_dtype=placement.dtype,
            revision=revision,
        )
        return cls(transformer, codec, placement)

    @classmethod
    def from_training_checkpoint(
        cls,
        checkpoint: ModelName,
        model: ModelName | None,
        *,
        step: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        t5_cpu: bool = False,
        offload: bool = False,
        revision: str | None = None,
        vae_model: ModelName | None = None,
        text_model: ModelName | None = None,
    ) -> "WanSampler":
        """A transformer from a training run, with the text encoder and the autoencoder of a released model.

        Args:
            checkpoint: the run's checkpoint folder.
            model: where text encoder, tokenizer and autoencoder are; None if the last two arguments say it.
            step: which checkpoint; the newest complete one by default.
            device, dtype, t5_cpu, offload, revision, vae_model, text_model: as in ``from_pretrained``.

        Raises:
            ValueError: no complete checkpoint, a damaged one, or one that was trained in another latent space.
        """
        placement = Placement.choose(device, dtype, t5_cpu=t5_cpu, offload=offload)
        transformer = transformer_of_checkpoint(checkpoint, step, dtype=placement.dtype)
        codec = load_codec(
            model,
            transformer,
            vae_model=vae_model,
            text_model=text_model,
            text_dtype=placement.dtype,
            revision=revision,
        )
        return cls(transformer, codec, placement)

    def embed(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ D"]]:
        """Embeddings of prompts, fp32 on the CPU; each text is embedded once in the sampler's life.

        One at a time, so that a prompt's embedding does not depend on what stands beside it.
        """
        place = self.placement
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]:
            with at_work(self.codec.text_encoder, place.text_device, place.text_home):
                for prompt in new:
                    self._embeddings[prompt] = self.codec.encode_text([prompt])[0].cpu()
        return [self._embeddings[prompt] for prompt in prompts]

    def sample_latents(
        self,
        prompts: Sequence[str],
        *,
        width: int = 832,
        height: int = 480,
        frames: int = 81,
        seed: int | Sequence[int] = 0,
        settings: Settings | None = None,
        noise: Float[Tensor, "B C F h w"] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "B C F h w"]:
        """Normalised latents of videos of one size, fp32 on the CPU.

        Args:
            prompts: one a video.
            width, height: pixels, multiples of 16.
            frames: 4n+1.
            seed: one for all, or one a video; a video depends on its own alone.
            settings: how to sample; the official ones by default.
            noise: in place of drawn noise.
            on_step: called with (steps done, steps) after each.

        Raises:
            ValueError: sizes that the model cannot have, or counts that differ.
        """
        settings = settings or Settings()
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if not prompts or len(seeds) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds; expected one seed a prompt")
        check_frames(frames)
        check_size(width, height)
        shape = self.codec.spec.latent_shape(frames, height, width)
        if noise is None:
            noise = torch.stack([draw_noise(shape, own) for own in seeds])
        elif tuple(noise.shape) != (len(prompts), *shape):
            raise ValueError(f"the noise has the shape {tuple(noise.shape)}; expected {(len(prompts), *shape)}")
        texts = self.embed(prompts)
        negative = self.embed([settings.negative_prompt])[0] if settings.guidance != 1 else None
        with at_work(self.model, self.placement.device, self.placement.home):
            latents = denoise(
                self.model,
                noise,
                texts,
                negative,
                settings,
                text_length=self.codec.spec.text_length,
                on_step=on_step,
            )
        return latents.cpu()

    def decode(self, latents_BCFHW: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 T H W"]:
        """RGB in [-1, 1], fp32 on the CPU; one video at a time is on the device."""
        place = self.placement
        with at_work(self.codec.vae, place.device, place.home):
            videos = [self.codec.decode_video(latent[None].to(place.device)).cpu() for latent in latents_BCFHW]
        return torch.cat(videos)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        width: int = 832,
        height: int = 480,
        frames: int = 81,
        steps: int = 50,
        shift: float = 5.0,
        guidance: float = 5.0,
        seed: int | Sequence[int] = 0,
        negative_prompt: str = NEGATIVE_PROMPT,
        solver: SolverName = "unipc",
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "B 3 T H W"]:
        """Videos of one size: RGB in [-1, 1], fp32 on the CPU.

        Args:
            prompts: one a video; all are computed together, so memory grows with their number.
            width, height: pixels, multiples of 16.
            frames: 4n+1; 1 makes a picture.
            steps, shift, guidance, negative_prompt, solver: see ``requests.Settings``.
            seed: one for all, or one a video; a video depends on its own alone.
            on_step: called with (steps done, steps) after each.

        Raises:
            ValueError: sizes or settings that the model cannot have, naming what it can.
        """
        settings = Settings(steps, shift, guidance, solver, negative_prompt)
        latents = self.sample_latents(
            prompts, width=width, height=height, frames=frames, seed=seed, settings=settings, on_step=on_step
        )
        return self.decode(latents)
