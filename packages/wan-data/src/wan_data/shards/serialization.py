"""Serialization of samples to the members of a shard: deterministic bytes, and reading them without running code.

FORMAT.md describes the members. L text tokens, D text width; a latent is [C, F, H, W].
"""

import collections
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MEMBERS = ("json", "pickle", "pth")  # in the order of a shard
LARGEST_MEMBER = 1 << 30  # bytes; a 121-frame 720p latent has 29 MB
LARGEST_INFO = 16 << 20  # bytes of a json member; a caption has at most 400 kB
LARGEST_SIDE = 4096  # of a latent's frames, rows or columns
LARGEST_TEXT = 4096  # tokens
# Normalised latents have a deviation of 1; NVIDIA's preparation refuses the same values.
LARGEST_LATENT = 1e3
LARGEST_EMBEDDING = 1e5
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class RefusedMember(ValueError):
    """A member of a shard is not of this format, or would run code."""


# -- writing ----------------------------------------------------------------------------------------------------------


def tensor_to_pth(tensor: Tensor) -> bytes:
    """Serialize with ``torch.save``; equal tensors give equal bytes."""
    out = io.BytesIO()
    # Without the copy, a view would be saved with its whole storage.
    torch.save(tensor.detach().cpu().contiguous().clone(), out)
    return out.getvalue()


class _StablePickler(pickle.Pickler):
    # A pickled tensor is (_rebuild_tensor_v2, (storage, ...)), and the bytes of the storage contain its memory address.
    # A storage in torch's zip container has no address in its bytes, and every version of torch reads it.
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            out = io.BytesIO()
            torch.save(obj, out)
            return torch.storage._load_from_bytes, (out.getvalue(),)
        return NotImplemented


def tensor_to_pickle(tensor: Tensor) -> bytes:
    """Serialize so that ``pickle.loads`` reads it; equal tensors give equal bytes."""
    out = io.BytesIO()
    _StablePickler(out, protocol=4).dump(tensor.detach().cpu().contiguous().clone())
    return out.getvalue()


def info_to_json(info: dict[str, Any]) -> bytes:
    """Serialize side information, with sorted keys."""
    return json.dumps(info, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


# -- reading ----------------------------------------------------------------------------------------------------------


def _load_safely(data: bytes) -> Any:
    if data.startswith(b"PK"):
        _check_archive(data)
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _check_archive(data: bytes) -> None:
    # torch.save stores its files side by side as they are; what is packed, or stored in one place, can be any size.
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED for file in files) or sum(f.file_size for f in files) > len(data):
        raise RefusedMember("it is a compressed archive; expected one as torch.save writes it")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    # Pickles of protocol 2 and older encode bytes this way; the real codecs.encode accepts any registered codec.
    if encoding not in ("latin1", "latin-1"):
        raise RefusedMember(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_NEEDED_BY_TENSORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    # the original unpickles its argument with weights_only=False
    ("torch.storage", "_load_from_bytes"): _load_safely,
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED_BY_TENSORS:
            raise RefusedMember(f"it wants to load {module}.{name}, which no tensor needs")
        return _NEEDED_BY_TENSORS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedMember(f"it refers to an object outside itself ({pid!r})")


def _read(read: Callable[[], Any], what: str) -> Any:
    try:
        return read()
    except RefusedMember:
        raise
    except Exception as error:
        # A damaged or malicious pickle may raise any exception; no code of it has been run.
        reason = str(error).split("\n", 1)[0][:200]
        raise RefusedMember(f"it does not hold {what}: {type(error).__name__}: {reason}") from None


def _checked(value: Any, rank: int, bounds: tuple[int, ...], what: str, largest: float) -> Tensor:
    if type(value) is not Tensor:
        raise RefusedMember(f"it holds a {type(value).__name__}; expected {what}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.requires_grad:
        raise RefusedMember(f"it holds a {value.layout} tensor on {value.device}; expected {what}")
    if value.dtype not in FLOATS:
        raise RefusedMember(f"its values are {value.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if value.ndim != rank or any(not 1 <= side <= bound for side, bound in zip(value.shape, bounds, strict=True)):
        raise RefusedMember(f"its shape is {tuple(value.shape)}; expected {what} of at most {bounds}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise RefusedMember(f"its shape {tuple(value.shape)} needs more values than it stores")
    # Both are not a number if any value is.
    low, high = (float(end) for end in value.aminmax())
    found = max(-low, high)
    if not math.isfinite(found):
        raise RefusedMember("it holds values that are not finite")
    if found > largest:
        raise RefusedMember(f"it holds a value of {found:.3g}; expected {what} of at most {largest:g}")
    return value.contiguous()


def _sized(data: bytes, most: int = LARGEST_MEMBER) -> bytes:
    if not isinstance(data, bytes) or len(data) > most:
        raise RefusedMember(f"it has more than {most} bytes")
    return data


def latent_from_pth(data: bytes) -> Float[Tensor, "C F H W"]:
    """Read the latent of a ``pth`` member.

    Raises:
        RefusedMember: the member is not a plain, finite tensor of that rank.
    """
    value = _read(lambda: _load_safely(_sized(data)), "a tensor")
    return _checked(value, 4, (LARGEST_SIDE,) * 4, "a latent [channels, frames, rows, columns]", LARGEST_LATENT)


def text_from_pickle(data: bytes) -> Float[Tensor, "L D"]:
    """Read the text embedding of a ``pickle`` member.

    Raises:
        RefusedMember: the member is not a plain, finite tensor of that rank.
    """
    value = _read(lambda: _TensorUnpickler(io.BytesIO(_sized(data))).load(), "a pickled tensor")
    return _checked(value, 2, (LARGEST_TEXT, 1 << 16), "a text embedding [tokens, width]", LARGEST_EMBEDDING)


def info_from_json(data: bytes) -> dict[str, Any]:
    """Read the object of a ``json`` member.

    Raises:
        RefusedMember: the member is not a JSON object.
    """
    value = _read(lambda: json.loads(_sized(data, LARGEST_INFO).decode("utf-8-sig")), "JSON")
    if not isinstance(value, dict):
        raise RefusedMember(f"it holds a JSON {type(value).__name__}; expected an object")
    return value
