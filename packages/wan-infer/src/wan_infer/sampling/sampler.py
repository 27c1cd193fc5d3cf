"""The sampler: prompts to videos.

Shapes: B videos, T frames, H rows, W columns (pixels); C latent channels, F latent frames, h rows, w columns; t frames
that come at once.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from wan_infer.loading.lora_unmerged import UnmergedLoras, check_unmerged
from wan_infer.loading.sources import CodecSource, TransformerSource, check_latent_space
from wan_infer.request.options import (
    ComputeOptions,
    ModelName,
    ModelSources,
    SamplerOptions,
    parse_options,
    scales_of,
)
from wan_infer.request.settings import check_size
from wan_infer.runtime.parallelism import Parallelism
from wan_infer.runtime.placement import Placement, onload
from wan_infer.sampling.decode import decode_frames
from wan_infer.sampling.denoise import denoise
from wan_model.codec.latent_codec import LatentCodec
from wan_model.dit.model import WanDiT
from wan_model.sampling.denoising import OnStep, draw_noise
from wan_model.sampling.settings import NEGATIVE_PROMPT, Settings, SolverName
from wan_model.video_shape import check_frames
from wan_model.weights.lora_reading import LoraWeights, find_lora, lora_name, read_lora


class WanSampler:
    """A transformer with its text encoder and its autoencoder, loaded once for any number of videos.

    For example:

        sampler = WanSampler.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        video = sampler.sample(["a rabbit in a meadow"], width=832, height=480, frames=81, seed=42)[0]
        save_video(video, "rabbit.mp4")

    Each part is loaded when it is first needed. With ``parallelism`` every process makes the same calls and gets the
    same results.

    Args:
        sources: of the models.
        options: devices, precision and memory.
        parallelism: the part of this process; by default it computes everything.

    Attributes:
        spec: the latent space of the autoencoder and the text encoder.
        lora_mode: whether LoRA files are merged; see ``ModelSources``.
        lora_record: names and scales of the LoRA files, or None.
        token_counts: tokens of every embedded prompt, with the end token; those beyond ``spec.text_length`` were cut.

    Raises:
        ValueError: a part is missing, belongs to another model, or does not match the other parts.
    """

    def __init__(
        self, sources: ModelSources, options: ComputeOptions | None = None, *, parallelism: Parallelism | None = None
    ) -> None:
        options = options or ComputeOptions()
        self.placement = Placement.choose(options)
        self.tiles = options.tiles
        self.parallelism = parallelism or Parallelism()
        self.source = TransformerSource.find(sources)
        self._codec_source = CodecSource(sources)
        self.spec = check_latent_space(self.source, self._codec_source)
        # Found once: a run that goes on writes newer checkpoints.
        self._loras = [(find_lora(path), scale) for path, scale in sources.loras]
        self.lora_mode = sources.lora_mode
        self.lora_record = self.describe_loras(None)
        # They are read to refuse an invalid file before large ones are read.
        self._lora_bases = [lora.base for lora in self._read_loras()]
        self._embeddings: dict[str, Tensor] = {}
        self.token_counts: dict[str, int] = {}

    @classmethod
    def from_pretrained(
        cls, model: ModelName, *, parallelism: Parallelism | None = None, **options: Unpack[SamplerOptions]
    ) -> "WanSampler":
        """Released weights: a folder in diffusers' layout, or a hub id.

        Args:
            model: of the transformer, and of the parts that no option gives.
            parallelism: see the class.
            options: see ``ModelSources`` and ``ComputeOptions``.

        Raises:
            ValueError: see the class.
        """
        return cls(*parse_options(options, model=model), parallelism=parallelism)

    @classmethod
    def from_training_checkpoint(
        cls,
        checkpoint: ModelName,
        model: ModelName | None,
        *,
        step: int | None = None,
        ema: bool = False,
        parallelism: Parallelism | None = None,
        **options: Unpack[SamplerOptions],
    ) -> "WanSampler":
        """A transformer from a training run, with the text encoder and the autoencoder of a released model.

        Args:
            checkpoint: the run's checkpoint folder.
            model: of text encoder, tokenizer and autoencoder; None if ``vae_model`` and ``text_model`` are given.
            step: which checkpoint; the newest complete one by default.
            ema: load the EMA of the checkpoint's weights instead of the weights.
            parallelism: see the class.
            options: see ``ModelSources`` and ``ComputeOptions``.

        Raises:
            ValueError: no complete checkpoint, a damaged one, or one that was trained in another latent space.
        """
        sources, compute = parse_options(options, model=model, checkpoint=checkpoint, step=step, ema=ema)
        return cls(sources, compute, parallelism=parallelism)

    def _read_loras(self) -> list[LoraWeights]:
        if self.lora_mode == "merged":
            return [read_lora(path, self.source.config, scale) for path, scale in self._loras]
        found = []
        for path, _ in self._loras:
            found.append(lora := read_lora(path, self.source.config))
            check_unmerged(lora, self.source.config, path)
        return found

    def describe_loras(self, lora_scale: float | Sequence[float] | None) -> str | None:
        """Names and scales of the LoRA files, or None.

        Args:
            lora_scale: see ``sample_latents``.

        Raises:
            ValueError: see ``sample_latents``.
        """
        pairs = zip(self._loras, self._scales(lora_scale), strict=True)
        return ", ".join(f"{lora_name(path)} x {scale:g}" for (path, _), scale in pairs) or None

    def foreign_loras(self) -> list[str]:
        """A sentence for each LoRA that was trained on other weights than it changes here, where it records them.

        This reads the whole base where one does. LoRA are applied to other models on purpose, so it is no error.
        """
        named = [
            (f"the LoRA {lora_name(path)}", base) for (path, _), base in zip(self._loras, self._lora_bases, strict=True)
        ]
        if (own := self.source.own_base()) is not None:
            named.insert(0, (f"the LoRA of the checkpoint {lora_name(own[0])}", own[1]))
        known = [(name, base) for name, base in named if base is not None]
        if not known or (digest := self.source.base_digest()) is None:
            return []
        return [
            f"{name} was trained on {base.name}, whose weights are not those of {self.source.base_name} (digest "
            f"{base.digest[:12]} where they have {digest[:12]}); it is applied all the same"
            for name, base in known
            if base.digest != digest
        ]

    def _scales(self, lora_scale: float | Sequence[float] | None) -> tuple[float, ...]:
        if lora_scale is None:
            return tuple(scale for _, scale in self._loras)
        if self.lora_mode == "merged" or not self._loras:
            raise ValueError(
                f"a call has the LoRA scale {lora_scale} and "
                + ("the LoRA is merged into the weights" if self._loras else "there is no LoRA")
                + "; make the sampler with LoRA files and the LoRA mode unmerged"
            )
        return scales_of(lora_scale, len(self._loras))

    @functools.cached_property
    def model(self) -> WanDiT:
        """The transformer."""
        return self.source.load(
            dtype=self.placement.dtype,
            device=self._model_offload_device,
            parallelism=self.parallelism,
            # They are read again, so that their tensors are not kept beside the weights that they are merged into.
            loras=self._read_loras() if self.lora_mode == "merged" else self._unmerged,
        )

    @functools.cached_property
    def _unmerged(self) -> UnmergedLoras:
        return UnmergedLoras(self._read_loras() if self.lora_mode == "unmerged" else ())

    @property
    def _model_offload_device(self) -> torch.device:
        # Sharded weights stay on the device: a block is gathered only while it computes.
        return self.placement.device if self.parallelism.sharded else self.placement.offload_device

    @functools.cached_property
    def codec(self) -> LatentCodec:
        """The autoencoder's decoder."""
        placement = self.placement
        codec = self._codec_source.load_decoder(self.source.text_length, placement.vae_dtype, tf32=placement.vae_tf32)
        assert codec.decoder is not None, "it was loaded"
        codec.decoder.to(placement.offload_device)
        return codec

    @functools.cached_property
    def text_codec(self) -> LatentCodec:
        """The text encoder; see ``release_text``."""
        codec = self._codec_source.load_text(self.source.text_length, self.placement.dtype)
        assert codec.text_encoder is not None, "it was loaded"
        codec.text_encoder.to(self.placement.text_offload_device)
        return codec

    def release_text(self) -> None:
        """Free the text encoder's memory; it is loaded again for a prompt that was not embedded before."""
        self.__dict__.pop("text_codec", None)
        if self.placement.text_device.type == "cuda":
            torch.cuda.empty_cache()

    def embed(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ D"]]:
        """Embeddings of prompts, fp32 on the CPU; they are cached.

        Prompts are embedded one at a time, so that an embedding does not depend on the other prompts. Of several
        processes rank 0 embeds, and the others receive. A prompt is cut to ``spec.text_length`` tokens, as in the
        official code; ``token_counts`` tells which ones were.
        """
        placement = self.placement
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]:
            found = None
            if self.parallelism.rank == 0:
                encoder = self.text_codec.text_encoder
                assert encoder is not None, "it was loaded"
                with onload(encoder, placement.text_device, placement.text_offload_device):
                    encoded = [self.text_codec.encode_prompt(prompt) for prompt in new]
                found = [*(embedding.cpu() for embedding, _ in encoded), torch.tensor([count for _, count in encoded])]
            *embeddings, counts = self.parallelism.broadcast(found)
            self._embeddings.update(zip(new, embeddings, strict=True))
            self.token_counts.update(zip(new, counts.tolist(), strict=True))
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
        lora_scale: float | Sequence[float] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "B C F h w"]:
        """Normalised latents of videos of one size, fp32 on the CPU.

        Args:
            prompts: one a video.
            width, height: pixels, multiples of 16.
            frames: 4n+1.
            seed: one for all, or one a video; a video does not depend on the seeds of others.
            settings: of sampling; the official ones by default.
            noise: instead of noise drawn from the seeds.
            lora_scale: of this call's videos, for all LoRA files or one each; by default those that were given with the
                files. With the mode ``unmerged``; 0 for all gives the videos without LoRA.
            on_step: called with (steps done, steps) after each.

        Raises:
            ValueError: sizes that the model does not support, or counts that differ; scales of LoRA that is merged.
        """
        settings, scales = settings or Settings(), self._scales(lora_scale)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if not prompts or len(seeds) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds; expected one seed a prompt")
        check_frames("the number of frames", frames)
        check_size(width, height)
        shape = self.spec.latent_shape(frames, height, width)
        if noise is None:
            noise = torch.stack([draw_noise(shape, own) for own in seeds])
        elif tuple(noise.shape) != (len(prompts), *shape):
            raise ValueError(f"the noise has the shape {tuple(noise.shape)}; expected {(len(prompts), *shape)}")
        texts = self.embed(prompts)
        negative = self.embed([settings.negative_prompt])[0] if settings.guidance != 1 else None
        with onload(self.model, self.placement.device, self._model_offload_device):
            self._unmerged.set_scales(scales, self.placement.device)
            latents = denoise(
                self.model,
                noise.to(self.placement.device),
                texts,
                negative,
                settings,
                parallelism=self.parallelism,
                on_step=on_step,
            )
        return latents.cpu()

    def decode_frames(self, latents_CFhw: Float[Tensor, "C F h w"]) -> Iterator[Float[Tensor, "3 t H W"]]:
        """One video's frames in their order, RGB in [-1, 1], fp32 on the CPU: the first, then four at a time.

        Of several processes each decodes its tiles of every frame, and gets all of them.
        """
        placement = self.placement
        assert self.codec.decoder is not None, "it was loaded"
        with onload(self.codec.decoder, placement.device, placement.offload_device):
            yield from decode_frames(self.codec, latents_CFhw.to(placement.device), self.parallelism, self.tiles)

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
        lora_scale: float | Sequence[float] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "B 3 T H W"]:
        """Videos of one size: RGB in [-1, 1], fp32 on the CPU.

        Args:
            prompts: one a video; all are computed in one batch, so memory grows with their number.
            width, height: pixels, multiples of 16.
            frames: 4n+1; 1 makes a picture.
            steps, shift, guidance, negative_prompt, solver: see ``wan_model.sampling.settings.Settings``.
            seed: one for all, or one a video; a video does not depend on the seeds of others.
            lora_scale: see ``sample_latents``.
            on_step: called with (steps done, steps) after each.

        Raises:
            ValueError: sizes or settings that the model does not support, naming those that it does.
        """
        settings = Settings(steps, shift, guidance, solver, negative_prompt)
        latents = self.sample_latents(
            prompts,
            width=width,
            height=height,
            frames=frames,
            seed=seed,
            settings=settings,
            lora_scale=lora_scale,
            on_step=on_step,
        )
        return self.decode(latents)
