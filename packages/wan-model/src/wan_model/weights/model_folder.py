"""Diffusers' folder layout: resolving it, reading its configuration and index files, and its latent space."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_model.extras import requires_extra
from wan_model.latent_spec import LatentSpec
from wan_model.system import safe_reading

# Bytes; the index of a 14B model has a hundred thousand, a tokenizer some millions.
_LARGEST_INDEX = 64 << 20
# Tensors that are small, so they are read quickly, and that differ between trained models. They are compared in
# bfloat16, so that a folder stored in that precision counts as the same model.
_VAE_DIGEST_KEYS = ("encoder.conv_in.bias", "encoder.conv_out.bias", "quant_conv.bias", "decoder.conv_in.bias")
_TEXT_DIGEST_KEYS = ("encoder.final_layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight")


class MissingPartsError(ValueError):
    """A folder lacks parts of a model.

    Args:
        folder: the model's.
        parts: names of the folders that it lacks.
    """

    def __init__(self, folder: Path, parts: Sequence[str]) -> None:
        super().__init__(f"{folder} has no {', '.join(parts)} folder; expected a model in diffusers' layout")
        self.folder, self.parts = folder, list(parts)


def resolve_folder(model: str | os.PathLike[str], parts: Sequence[str], *, revision: str | None = None) -> Path:
    """The local folder of a model given by path or by hub id, with the named parts present.

    A hub id is downloaded (safetensors and small files only) with ``HF_TOKEN`` from the environment.

    Raises:
        MissingPartsError: a part is missing.
        ValueError: it is neither a folder nor a hub id.
    """
    folder = Path(model)
    if not folder.is_dir():
        name = os.fspath(model)
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise ValueError(
                f"no model at {name}: expected a folder in diffusers' layout or a hub id such as Wan-AI/NAME"
            )
        with requires_extra("sampling"):
            from huggingface_hub import snapshot_download

        patterns = [f"{part}/*{ending}" for part in parts for ending in (".json", ".safetensors", ".model", ".txt")]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "model_index.json"]))
        except Exception as error:
            raise ValueError(f"{name} is no folder here, and the hub did not give it: {error}") from error
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise MissingPartsError(folder, missing)
    if "transformer" in parts:
        _refuse_wan_22(folder)
    return folder


def _refuse_wan_22(folder: Path) -> None:
    # The transformers of Wan 2.2's 14B model have Wan 2.1's configuration; only the pipeline's index differs.
    if not (folder / "model_index.json").is_file():
        return
    index = read_json(folder / "model_index.json")
    second = any(index.get("transformer_2") or [])
    if second or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ValueError(f"{folder} holds a Wan 2.2 model; only Wan 2.1 text-to-video is supported")


def read_json(path: Path, limit: int = _LARGEST_INDEX) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``limit`` bytes.

    Raises:
        ValueError: the file is absent, cannot be read, or is not a JSON object.
    """
    try:
        value = safe_reading.read_json(path, limit)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: it cannot be read, is cut short or is no safetensors file.
    """
    try:
        path.open("rb").close()  # safetensors says of a file that may not be read that it does not exist
        opened = safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        if (kind := _other_kind(path)) is not None:
            raise ValueError(f"{path} {kind}") from error
        raise ValueError(f"{path} is not a complete safetensors file ({error}); download or copy it again") from error
    with opened as file:
        yield file


def _other_kind(path: Path) -> str | None:
    """What a file is by its first bytes, and what to do, if it is known not to be safetensors."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty (0 bytes); download or copy it again"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "is a pickled file of PyTorch (.pt, .bin or .ckpt), which may run code; convert it to safetensors"
    if start.startswith(b"version https://git-lfs"):
        return "is the pointer of a file in Git LFS; fetch its content with git lfs pull"
    # The length of the header, with which a safetensors file begins, ends with zeros.
    return "is a text and no safetensors file; name the file with the weights" if b"\0" not in start else None


def weight_files(folder: Path, stem: str) -> dict[str, Path]:
    """The safetensors file of each key in a component's folder.

    Args:
        folder: the component's folder, e.g. ``transformer``.
        stem: the file's name before ``.safetensors`` (``diffusion_pytorch_model`` or ``model``).

    Raises:
        ValueError: there are no weights, or the index names a file that is absent or in another folder.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        places = read_json(index).get("weight_map", {})
        for name in sorted(set(places.values())):
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not a file beside it")
            if not (folder / name).is_file():
                raise ValueError(f"{index} names {name}, which is missing")
        return {key: folder / name for key, name in places.items()}
    if not single.is_file():
        raise ValueError(f"{folder} has neither {single.name} nor {index.name}; only safetensors weights are read")
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def _digest(folder: Path, stem: str, keys: Sequence[str]) -> str:
    files, digest = weight_files(folder, stem), hashlib.sha256()
    found = [key for key in keys if key in files]
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(keys)}: its weights are not those of Wan 2.1")
    for key in found:
        with open_weights(files[key]) as file:
            tensor: Tensor = file.get_tensor(key)
        digest.update(key.encode())
        digest.update(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def latent_spec_of(
    folder: Path, *, text_length: int = 512, vae: Path | None = None, text_encoder: Path | None = None
) -> LatentSpec:
    """The latent space of a model folder, from its configurations and a few small tensors.

    Args:
        folder: the model in diffusers' layout.
        text_length: tokens that prompts are cut to.
        vae, text_encoder: component folders outside ``folder``.

    Raises:
        ValueError: files that are missing or describe another kind of autoencoder.
    """
    vae, text_encoder = vae or folder / "vae", text_encoder or folder / "text_encoder"
    config = read_json(vae / "config.json")
    if config.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"{vae} holds a {config.get('_class_name')}; expected an AutoencoderKLWan")
    if config.get("is_residual") or config.get("patch_size"):
        raise ValueError(f"{vae} holds the autoencoder of Wan 2.2 (16 x 16 pixels a latent); expected that of Wan 2.1")
    downsample = config.get("temperal_downsample", [False, True, True])
    return LatentSpec(
        channels=config["z_dim"],
        temporal_stride=2 ** sum(map(bool, downsample)),
        spatial_stride=2 ** len(downsample),
        mean=tuple(config["latents_mean"]),
        std=tuple(config["latents_std"]),
        text_dim=read_json(text_encoder / "config.json")["d_model"],
        text_length=text_length,
        model_id=(
            f"vae-{_digest(vae, 'diffusion_pytorch_model', _VAE_DIGEST_KEYS)}"
            f"-text-{_digest(text_encoder, 'model', _TEXT_DIGEST_KEYS)}"
        ),
    )
