"""The sampler: prompts in, videos out.

Shapes: B videos, T frames, H rows, W columns (pixels); C latent channels, F latent frames, h rows, w columns; t frames
that come at once.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wan_infer.loading.lora import read_lora
from wan_infer.loading.sources import CodecSource, ModelName, TransformerSource, look_at_codec
from wan_infer.request.settings import NEGATIVE_PROMPT, Settings, SolverName, check_frames, check_size
from wan_infer.runtime.parallelism import Sharing
from wan_infer.runtime.placement import Placement, at_work
from wan_infer.sampling.decode import decode_frames
from wan_infer.sampling.denoise import OnStep, denoise, draw_noise
from wan_model.codec.latent_codec import LatentCodec
from wan_model.dit.model import WanDiT


class WanSampler:
    """A transformer with its text encoder and its autoencoder, loaded once for any number of videos.

    ::

        sampler = WanSampler.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        video = sampler.sample(["a rabbit in a meadow"], width=832, height=480, frames=81, seed=42)[0]
        save_video(video, "rabbit.mp4")

    Each part is read when it is needed first. Under torchrun every process makes the same calls and gets the same
    results.

    Args:
        source: of the transformer.
        codec_source: of text encoder and autoencoder.
        placement: devices and precision.
        sharing: this process's part; by default it does all.
        lora: a file in diffusers' format to merge into the transformer, and its scale.
        tiles: into which each process cuts frames to decode them; more need less memory.

    Attributes:
        spec: the latent space of the autoencoder and the text encoder.
        lora_record: name and scale of the LoRA, or None.

    Raises:
        ValueError: what is given does not fit together.
    """

    def __init__(
        self,
        source: TransformerSource,
        codec_source: CodecSource,
        placement: Placement,
        *,
        sharing: Sharing | None = None,
        lora: tuple[ModelName, float] | None = None,
        tiles: int = 1,
    ) -> None:
        if tiles < 1:
            raise ValueError(f"{tiles} tiles; expected at least 1")
        self.source, self.codec_source, self.placement = source, codec_source, placement
        self.sharing = sharing or Sharing()
        self.spec = look_at_codec(source, codec_source)
        self.tiles = tiles
        self._lora = None if lora is None else read_lora(lora[0], source.config, lora[1])
        self.lora_record = None if lora is None else f"{Path(lora[0]).name} x {lora[1]:g}"
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
        **options: Any,
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
            options: sharing, lora and tiles, see the class.

        Raises:
            ValueError: something is missing, is of another model, or does not fit together.
        """
        placement = Placement.choose(device, dtype, t5_cpu=t5_cpu, offload=offload)
        source = TransformerSource.of_model(model, revision=revision)
        return cls(source, CodecSource(model, vae_model, text_model, revision), placement, **options)

    @classmethod
    def from_training_checkpoint(
        cls,
        checkpoint: ModelName,
        model: ModelName | None,
        *,
        step: int | None = None,
        ema: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        t5_cpu: bool = False,
        offload: bool = False,
        revision: str | None = None,
        vae_model: ModelName | None = None,
        text_model: ModelName | None = None,
        **options: Any,
    ) -> "WanSampler":
        """A transformer from a training run, with the text encoder and the autoencoder of a released model.

        Args:
            checkpoint: the run's checkpoint folder.
            model: where text encoder, tokenizer and autoencoder are; None if the last two arguments say it.
            step: which checkpoint; the newest complete one by default.
            ema: the average of its weights instead of the weights.
            device, dtype, t5_cpu, offload, revision, vae_model, text_model, options: as in ``from_pretrained``.

        Raises:
            ValueError: no complete checkpoint, a damaged one, or one that was trained in another latent space.
        """
        placement = Placement.choose(device, dtype, t5_cpu=t5_cpu, offload=offload)
        source = TransformerSource.of_checkpoint(checkpoint, step, ema=ema)
        return cls(source, CodecSource(model, vae_model, text_model, revision), placement, **options)

    @functools.cached_property
    def model(self) -> WanDiT:
        """The transformer."""
        return self.source.load(
            dtype=self.placement.dtype, device=self._model_home, sharing=self.sharing, lora=self._lora
        )

    @property
    def _model_home(self) -> torch.device:
        # Spread weights stay where they are: a layer is gathered only while it works.
        return self.placement.device if self.sharing.weights else self.placement.home

    @functools.cached_property
    def codec(self) -> LatentCodec:
        """What decodes latents."""
        codec = self.codec_source.load_decoder(self.source.text_length)
        assert codec.decoder is not None, "it was loaded"
        codec.decoder.to(self.placement.home)
        return codec

    @functools.cached_property
    def text_codec(self) -> LatentCodec:
        """The text encoder's half; see ``release_text``."""
        codec = self.codec_source.load_text(self.source.text_length, self.placement.dtype)
        assert codec.text_encoder is not None, "it was loaded"
        codec.text_encoder.to(self.placement.text_home)
        return codec

    def release_text(self) -> None:
        """Give the text encoder's memory back; it is read again for a prompt that was not embedded before."""
        self.__dict__.pop("text_codec", None)
        if self.placement.text_device.type == "cuda":
            torch.cuda.empty_cache()

    def embed(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ D"]]:
        """Embeddings of prompts, fp32 on the CPU; each text is embedded once in the sampler's life.

        One at a time, so that a prompt's embedding does not depend on what stands beside it. Of several processes the
        first embeds for all.
        """
        place = self.placement
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]:
            found = None
            if self.sharing.rank == 0:
                encoder = self.text_codec.text_encoder
                assert encoder is not None, "it was loaded"
                with at_work(encoder, place.text_device, place.text_home):
                    found = [self.text_codec.encode_text([prompt])[0].cpu() for prompt in new]
            self._embeddings.update(zip(new, self.sharing.from_first(found), strict=True))
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
        shape = self.spec.latent_shape(frames, height, width)
        if noise is None:
            noise = torch.stack([draw_noise(shape, own) for own in seeds])
        elif tuple(noise.shape) != (len(prompts), *shape):
            raise ValueError(f"the noise has the shape {tuple(noise.shape)}; expected {(len(prompts), *shape)}")
        texts = self.embed(prompts)
        negative = self.embed([settings.negative_prompt])[0] if settings.guidance != 1 else None
        with at_work(self.model, self.placement.device, self._model_home):
            latents = denoise(
                self.model,
                noise.to(self.placement.device),
                texts,
                negative,
                settings,
                text_length=self.spec.text_length,
                sharing=self.sharing,
                on_step=on_step,
            )
        return latents.cpu()

    def decode_frames(self, latents_CFhw: Float[Tensor, "C F h w"]) -> Iterator[Float[Tensor, "3 t H W"]]:
        """One video's frames in their order, RGB in [-1, 1], fp32 on the CPU: the first, then four at a time.

        Of several processes each decodes its part of every frame.
        """
        place = self.placement
        assert self.codec.decoder is not None, "it was loaded"
        with at_work(self.codec.decoder, place.device, place.home):
            yield from decode_frames(self.codec, latents_CFhw.to(place.device), self.sharing, self.tiles)

    def decode(self, latents_BCFHW: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 T H W"]:
        """RGB in [-1, 1], fp32 on the CPU; one video at a time is on the device."""
        return torch.stack([torch.cat(list(self.decode_frames(latent)), dim=1) for latent in latents_BCFHW])

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
