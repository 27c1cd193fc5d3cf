"""What is sampled: captions of the validation split or a file of prompts, and the decoder of the data's model.

Import only after ``wan_train.engine.start``. One rank makes this and sends it to the others.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_model import LatentPack
from wan_model.codec.latent_codec import LatentCodec
from wan_model.sampling.settings import check_text
from wan_model.system.safe_reading import read_text
from wan_model.weights.model_folder import MissingPartsError
from wan_train.data.dataset import empty_caption_of
from wan_train.sampling.latents import SamplePlan, SampleRequest

Shape = tuple[int, int, int, int]


def make_plan(config: Any) -> tuple[SamplePlan, LatentCodec]:
    """The videos of a run and the decoder, on the CPU.

    Raises:
        ValueError: there is no model to decode with, no caption or prompt, or a file is missing or damaged.
    """
    samples, settings = config.samples, config.samples.settings
    prompts = _read_prompts(Path(samples.prompts)) if samples.prompts is not None else None
    packs = _validation_packs(config, 1 if prompts else samples.count)
    negative = _negative_of_data(config) if settings.guided else None
    cut: list[str] = []
    codec = _load_codec(config, text=prompts is not None or (settings.guided and negative is None))
    if settings.guided and negative is None:
        negative = _embed(codec, "negative prompt", settings.negative_prompt, cut)
    if prompts is not None:
        shapes = [_shape(config, codec, packs[0] if packs else None)] * len(prompts)
        texts, captions = [_embed(codec, "prompt", prompt, cut) for prompt in prompts], list(prompts)
    else:
        shapes = [_shape(config, codec, pack) for pack in packs]
        texts = [pack.texts.rows_RD.float() for pack in packs]
        captions = _captions(config, packs)
    codec.text_encoder = codec.tokenizer = None  # they take gigabytes
    requests = [
        SampleRequest(f"{number:02d}", caption, text.contiguous(), shape, samples.seed + number)
        for number, (caption, text, shape) in enumerate(zip(captions, texts, shapes, strict=True))
    ]
    return SamplePlan(requests, negative, settings, config.model.wan_config.text_length, cut), codec


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise ValueError(f"the prompts file {path} cannot be read: {error.strerror}") from None
    if not prompts:
        raise ValueError(f"the prompts file {path} holds no prompt")
    for prompt in prompts:
        check_text("prompt", prompt)
    return prompts


def _validation_packs(config: Any, count: int) -> list[LatentPack]:
    """The first samples of the validation split, one a pack; with prompts there need be none."""
    try:
        return list(itertools.islice(config.dataset.validation_packs(), count))
    except ValueError:
        if config.samples.prompts is None:
            raise
        return []


def _captions(config: Any, packs: Sequence[LatentPack]) -> list[str]:
    keys = [pack.keys[0] for pack in packs]
    found = dict(itertools.islice(config.dataset.validation_captions(), len(packs)))
    return [found.get(key, key) for key in keys]


def _negative_of_data(config: Any) -> Tensor | None:
    """The embedding of the empty caption that the dataset holds, if that is the negative prompt."""
    if config.samples.negative_prompt:
        return None
    try:
        return empty_caption_of(config)
    except ValueError:
        return None


def _load_codec(config: Any, *, text: bool) -> LatentCodec:
    """The decoder of the model that the data were encoded with, and its text encoder if that is needed."""
    dataset, model = config.dataset, config.model
    cut_to = model.spec.text_length if model.spec else model.wan_config.text_length
    for name in dict.fromkeys(one for one in (dataset.encoded_by, model.init_from) if one is not None):
        try:
            codec = LatentCodec.from_pretrained(
                name,
                load_vae=False,
                load_text=text,
                load_decoder=True,
                text_dtype=model.params_dtype,
                text_length=cut_to,
                tf32=True,
            )
        except MissingPartsError:
            if name == dataset.encoded_by:
                raise
            continue  # a transformer to start from need not have the other parts
        # That it is the data's latent space is checked before, but not for mock data.
        sizes = (codec.spec.channels, codec.spec.text_dim)
        if sizes != (wanted := (model.wan_config.in_channels, model.wan_config.text_dim)):
            raise ValueError(
                f"the model {name} has {sizes[0]} latent channels and texts of width {sizes[1]}; the transformer takes "
                f"{wanted[0]} and {wanted[1]}"
            )
        return codec
    raise ValueError("there is no model to decode with; set dataset.encoded_by to the one that encoded the data")


def _embed(codec: LatentCodec, kind: str, prompt: str, cut: list[str]) -> Tensor:
    """The embedding of a prompt; one that is too long is cut as by ``wan-infer``, which is added to ``cut``."""
    embedding, count = codec.encode_prompt(prompt)
    if count > (most := codec.spec.text_length):
        shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:60]}...")
        cut.append(f"the {kind} {shown} has {count} tokens; the model takes {most}, the rest is cut")
    return embedding


def _shape(config: Any, codec: LatentCodec, pack: LatentPack | None) -> Shape:
    """The latent shape of a video: that of the validation sample where no size is set."""
    samples, spec = config.samples, codec.spec
    given = {"frames": samples.frames, "height": samples.height, "width": samples.width}
    if pack is not None:
        patch = config.model.wan_config.patch_size
        f, h, w = (tokens * side for tokens, side in zip(pack.layout.grids[0], patch, strict=True))
        own = {
            "frames": 1 + (f - 1) * spec.temporal_stride,
            "height": h * spec.spatial_stride,
            "width": w * spec.spatial_stride,
        }
        given = {name: own[name] if value is None else value for name, value in given.items()}
    if missing := [f"samples.{name}" for name, value in given.items() if value is None]:
        raise ValueError(f"there is no validation sample to take a size from; set {', '.join(missing)}")
    return spec.latent_shape(*(int(value) for value in given.values() if value is not None))
