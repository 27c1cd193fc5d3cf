"""The text embedding of the empty caption, stored beside the shards: training uses it for dropped captions."""

import hashlib
import os
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.reading.blends import parts_of
from wan_data.storage.files import is_there, read_small
from wan_data.storage.location import Location, StorePath
from wan_model.system.files import write_bytes

EMPTY_CAPTION_NAME = "empty-caption.safetensors"
_KEY = "text"


def write_empty_caption(folder: Path, text: Float[Tensor, "L D"]) -> str:
    """Write the embedding into a dataset's folder; returns the sha256 of the file."""
    data = save({_KEY: text.float().contiguous()})
    write_bytes(folder / EMPTY_CAPTION_NAME, data)
    return hashlib.sha256(data).hexdigest()


def read_empty_caption(path: str | os.PathLike[str] | StorePath) -> Float[Tensor, "L D"]:
    """Read the embedding of the empty caption of a dataset; for a blend, that of the first dataset that has one.

    The datasets of a blend have the same text encoder, so their embeddings are equal.

    Raises:
        ValueError: there is none, or the digest of the file differs from that of the manifest.
    """
    folders = dict.fromkeys(part.folder for parts in parts_of(path).values() for part in parts)
    for folder in folders:
        digest = read_manifest(folder).empty_caption if is_there(folder / MANIFEST_NAME) else None
        if digest is not None:
            return _read(folder / EMPTY_CAPTION_NAME, digest)
    raise ValueError(
        f"{path} holds no embedding of the empty caption, which replaces dropped captions; "
        "run wan-data prepare again with the same arguments, which adds it, or drop no captions"
    )


def _read(file: Location, digest: str) -> Float[Tensor, "L D"]:
    try:
        data = read_small(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, which {MANIFEST_NAME} names: the dataset is damaged") from None
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ValueError(f"{file} has the digest {found[:16]}; {MANIFEST_NAME} says {digest[:16]}: it is damaged")
    try:
        text = load(data).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    if text is None or text.ndim != 2 or not bool(torch.isfinite(text).all()):
        raise ValueError(f"{file} holds no finite text embedding [tokens, width] named {_KEY}")
    return text
