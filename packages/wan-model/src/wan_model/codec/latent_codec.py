"""The latent codec: the autoencoder and the text encoder that define the transformer's latent space.

Shapes: B videos, C colour or latent channels, T frames, H rows, W columns (pixels), F latent frames, L text tokens,
D text width.
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from wan_model.codec.convolutions import computed_with_tf32, tf32_convolutions
from wan_model.codec.prompt_cleaning import clean_prompt
from wan_model.codec.prompt_tokenizer import PromptTokenizer
from wan_model.codec.text_encoder import TextEncoder
from wan_model.codec.tiled_decode import Tile, TiledDecoder, split_frame
from wan_model.codec.vae_decoder import VaeDecoder
from wan_model.config import OFFICIAL_TEXT_LENGTH
from wan_model.config_checks import check_autoencoder
from wan_model.extras import requires_extra
from wan_model.latent_spec import LatentSpec
from wan_model.weights.model_folder import DIFFUSERS_STEM, latent_spec_of, read_json, read_tensors, resolve_folder

# Of the configuration; the rest is Wan 2.1's own.
_AUTOENCODER_SIZES = (
    *("base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample"),
    *("latents_mean", "latents_std"),
)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    # diffusers gives advice about other packages. It takes seconds to import, so it is imported where it is needed.
    with requires_extra("codec"):
        from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def import_autoencoder() -> Any:
    """diffusers' class of the autoencoder; importing it takes seconds, which a thread may spend beforehand."""
    with _quiet_import():
        from diffusers import AutoencoderKLWan
    return AutoencoderKLWan


def _load_autoencoder(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' autoencoder on the CPU, of exactly its weights: its ``from_pretrained`` ignores those that it lacks.

    Raises:
        ValueError: files that are missing or damaged, or weights of another model.
    """
    kind = import_autoencoder()
    file = folder / "config.json"
    config = read_json(file)
    check_autoencoder(config, str(file))
    sizes = {name: config[name] for name in _AUTOENCODER_SIZES if config.get(name) is not None}
    with torch.device("meta"):
        vae = kind(**sizes)
    shapes = {key: value.shape for key, value in vae.state_dict().items()}
    vae.load_state_dict(read_tensors(folder, DIFFUSERS_STEM, shapes, dtype=dtype), assign=True)
    return vae.eval().requires_grad_(False)


class LatentCodec:
    """Encodes and decodes videos and encodes prompts, equal to diffusers' ``WanPipeline``.

    Either half may be absent: a sampler with precomputed embeddings needs no text encoder.

    Args:
        spec: the latent space, with the statistics that latents are normalised by.
        vae: diffusers' ``AutoencoderKLWan``, or None.
        decoder: decodes latents, or None; by default created with the weights of ``vae``.
        text_encoder: UMT5's encoder, or None.
        tokenizer: the text encoder's tokenizer, or None.
        tf32: on a GPU, allow fp32 convolutions of the autoencoder to round their inputs to TF32.
    """

    def __init__(
        self,
        spec: LatentSpec,
        vae: Any = None,
        text_encoder: TextEncoder | None = None,
        tokenizer: PromptTokenizer | None = None,
        decoder: VaeDecoder | None = None,
        tf32: bool = False,
    ) -> None:
        self.spec = spec
        self.tf32 = tf32
        self.vae = vae
        if decoder is None and vae is not None:
            decoder = VaeDecoder.of_state(vae.config, vae.state_dict(), "the autoencoder")
        self.decoder = decoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None,
        *,
        vae_model: str | os.PathLike[str] | None = None,
        text_model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype = torch.float32,
        text_dtype: torch.dtype = torch.float32,
        load_vae: bool = True,
        load_text: bool = True,
        load_decoder: bool = False,
        text_length: int = OFFICIAL_TEXT_LENGTH,
        tf32: bool = False,
    ) -> "LatentCodec":
        """Load the autoencoder and the text encoder of a diffusers folder or hub id; safetensors only.

        Args:
            model: a folder with ``vae``, ``text_encoder`` and ``tokenizer`` in it, or a hub id; None if both of the
                following are given.
            vae_model: another model to take ``vae`` from.
            text_model: another model to take ``text_encoder`` and ``tokenizer`` from.
            revision: the hub id's revision.
            device: of both halves.
            vae_dtype: the official code runs the autoencoder in float32.
            text_dtype: bfloat16 halves the memory of the text encoder, at the cost of equality.
            load_vae, load_text: which halves to load.
            load_decoder: load only the decoder of the autoencoder, without importing diffusers.
            text_length: tokens that prompts are cut to (512 in the official code).
            tf32: see the class. torch allows it by default, and so does the official code.

        Raises:
            ValueError: a missing folder or file, naming it.
        """
        vae_model, text_model = vae_model or model, text_model or model
        if vae_model is None or text_model is None:
            raise ValueError("no model was given to take the autoencoder and the text encoder from")
        text_parts = ["text_encoder"] + (["tokenizer"] if load_text else [])
        vae_folder = resolve_folder(vae_model, ["vae"], revision=revision) / "vae"
        text_folder = resolve_folder(text_model, text_parts, revision=revision)
        spec = latent_spec_of(
            text_folder, text_length=text_length, vae=vae_folder, text_encoder=text_folder / "text_encoder"
        )
        vae = text_encoder = tokenizer = decoder = None
        if load_decoder:
            decoder = VaeDecoder.from_pretrained(vae_folder, vae_dtype).to(device)
        if load_vae:
            vae = _load_autoencoder(vae_folder, vae_dtype).to(device)
        if load_text:
            text_encoder = TextEncoder.from_pretrained(text_folder / "text_encoder", text_dtype).to(device)
            tokenizer = PromptTokenizer(text_folder / "tokenizer")
        return cls(spec, vae, text_encoder, tokenizer, decoder, tf32)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device) for values in (self.spec.mean, self.spec.std)
        )
        return rearrange(mean, "c -> 1 c 1 1 1"), rearrange(std, "c -> 1 c 1 1 1")

    def _require(self, part: str) -> Any:
        loaded = getattr(self, part)
        if loaded is None:
            raise ValueError(f"this codec was loaded without its {part}; load it with both halves")
        return loaded

    @torch.no_grad()
    def encode_video(self, video_BCTHW: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C F h w"]:
        """Encode a video: the normalised posterior mean, fp32.

        Args:
            video_BCTHW: RGB in [-1, 1]; 4n+1 frames, sides that 16 divides.

        Raises:
            ValueError: sizes that the autoencoder would crop silently.
        """
        vae = self._require("vae")
        self.spec.latent_shape(*video_BCTHW.shape[2:])
        with tf32_convolutions(self.tf32):
            mu = vae.encode(video_BCTHW.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(mu)
        return (mu - mean) / std

    def decode_video(self, latents_BCFHW: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 T H W"]:
        """Decode normalised latents: RGB in [-1, 1], fp32 on the CPU; see ``decode_frames``."""
        return torch.stack([torch.cat(list(self.decode_frames(latent)), dim=1) for latent in latents_BCFHW])

    def decode_frames(
        self, latents_CFhw: Float[Tensor, "C F h w"], *, tiles: tuple[int, int] = (1, 1)
    ) -> Iterator[Float[Tensor, "3 t H W"]]:
        """Decode one video frame by frame: the first frame, then four at a time; RGB in [-1, 1], fp32 on the CPU.

        The device holds the activations of four frames at a time, not of the whole video. Tiles divide these further;
        then all pixels are in main memory before the first frames are yielded.

        Args:
            latents_CFhw: normalised.
            tiles: tiles along the height and the width; see ``wan_model.codec.tiled_decode``.

        Raises:
            ValueError: more tiles than the frame can be cut into.
        """
        frame = [size * self.spec.spatial_stride for size in latents_CFhw.shape[2:]]
        places = split_frame(frame[0], frame[1], *tiles, TiledDecoder(self._require("decoder")).scale)
        features = self.decoder_features(latents_CFhw)
        if len(places) == 1:
            yield from (pixels.cpu() for pixels in self.decode_tile(features, places[0]))
            return
        kept = list(features)
        lengths = [1, *[self.spec.temporal_stride] * (len(kept) - 1)]
        video = [torch.empty(3, length, *frame) for length in lengths]
        for place in places:
            for whole, pixels in zip(video, self.decode_tile(kept, place), strict=True):
                whole[:, :, place.top : place.bottom, place.left : place.right] = pixels
        yield from video

    def decoder_features(self, latents_CFhw: Float[Tensor, "C F h w"]) -> Iterator[Tensor]:
        """The features of each latent frame, the input of ``decode_tile``; latents are normalised."""
        decoder = self._require("decoder")
        mean, std = self._statistics(latents_CFhw)
        raw = (latents_CFhw[None] * std + mean).to(decoder.device, decoder.dtype)
        return computed_with_tf32(TiledDecoder(decoder).features(raw), self.tf32)

    def decode_tile(self, features: Iterable[Tensor], tile: Tile) -> Iterator[Float[Tensor, "3 t H W"]]:
        """Decode one tile of each latent frame from ``decoder_features``: RGB in [-1, 1], fp32."""
        return computed_with_tf32(TiledDecoder(self._require("decoder")).pixels(features, tile), self.tf32)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Float[Tensor, "L D"]]:
        """Clean and embed prompts: fp32, each at its true length; ``pad_text`` adds the zero padding.

        Each prompt is embedded separately at its true length, which equals masking at the fixed length.

        Raises:
            ValueError: ``prompts`` is not a list or is empty, or see ``PromptTokenizer``.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"got {prompts!r}; expected a list of at least one prompt")
        return [self.encode_prompt(prompt)[0] for prompt in prompts]

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> tuple[Float[Tensor, "L D"], int]:
        """Clean and embed one prompt as ``encode_text`` does.

        Returns:
            The embedding, and the tokens of the prompt with the end token, of which at most ``spec.text_length`` are
            embedded.
        """
        text_encoder, tokenizer = self._require("text_encoder"), self._require("tokenizer")
        ids, count = tokenizer.tokenize(clean_prompt(prompt), self.spec.text_length, text_encoder.shared.num_embeddings)
        return text_encoder(torch.tensor(ids, device=text_encoder.device)).float(), count
