"""Diffusers' folder layout: resolving it, reading its configuration and index files, and its latent space."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_model.config import OFFICIAL_TEXT_LENGTH
from wan_model.config_checks import TEXT_ENCODER, check_autoencoder, check_numbers, check_sizes
from wan_model.extras import requires_extra
from wan_model.flow import TIMESTEPS
from wan_model.latent_spec import LatentSpec
from wan_model.system import safe_reading
from wan_model.system.files import require_local

# Bytes; the index of a 14B model has a hundred thousand, a tokenizer some millions.
_LARGEST_INDEX = 64 << 20
# Names of the files of weights before ``.safetensors``: of diffusers' components, and of transformers'.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_SCHEDULER = "scheduler/scheduler_config.json"
# Of diffusers' schedulers; a scheduler that lacks a key can do nothing else. The shift is a setting of each sampling.
_OBJECTIVE = {"num_train_timesteps": int(TIMESTEPS), "prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Files store the word embedding of a text encoder under one of these names, or under both.
EMBEDDING_KEYS = ("shared.weight", "encoder.embed_tokens.weight")
_BLOCK_KEYS = [f"layer.0.SelfAttention.{name}.weight" for name in "qkvo"]
_BLOCK_KEYS += [f"layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")]
# Of a matrix of a text encoder for its digest: rows, evenly spaced, and the first columns of each.
_EMBEDDING_ROWS, _MATRIX_ROWS, _COLUMNS = 64, 8, 4096
# safetensors' names of types; integers would be weights of a quantised model, whose scales are not read.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


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
    require_local("the model", model)
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
        # What must fit these parts.
        patterns += ["model_index.json", _SCHEDULER, "tokenizer/tokenizer.json"]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise ValueError(f"{name} is no folder here, and the hub did not give it: {error}") from error
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise MissingPartsError(folder, missing)
    if "transformer" in parts:
        _refuse_wan_22(folder)
        _check_scheduler(folder)
    return folder


def _refuse_wan_22(folder: Path) -> None:
    # The transformers of Wan 2.2's 14B model have Wan 2.1's configuration; only the pipeline's index differs.
    file = folder / "model_index.json"
    if not file.exists():
        return
    index = read_json(file)
    second = index.get("transformer_2") or []  # [null, null] of a model without one
    if not isinstance(second, list):
        raise ValueError(f"{file}: transformer_2 is {second!r:.60}; expected a list of a library and a class")
    if any(second) or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ValueError(f"{folder} holds a Wan 2.2 model; only Wan 2.1 text-to-video is supported")


def _check_scheduler(folder: Path) -> None:
    """Refuse weights whose scheduler says that they were trained for another objective than ``wan_model.flow``."""
    file = folder / _SCHEDULER
    if not file.exists():
        return
    config = read_json(file)
    for key, wanted in _OBJECTIVE.items():
        if (got := config.get(key, wanted)) != wanted:
            raise ValueError(
                f"{file}: {key} is {got!r:.60} where Wan 2.1 has {wanted!r}; take the transformer of a model that was "
                "trained with flow matching"
            )


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


# Bytes; that of a file with a thousand tensors has a hundred thousand.
_LARGEST_HEADER = 16 << 20


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: it cannot be read, is no file, is cut short or is no safetensors file.
    """
    try:
        # safetensors waits for the writer of a named pipe, and says of a file that may not be read that it is absent.
        with safe_reading.open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if _LARGEST_HEADER < length < path.stat().st_size:
            raise ValueError(f"{path} has a header of {length:,} bytes; at most {_LARGEST_HEADER:,} are read")
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


def stored_shape(file: Any, key: str, path: Path) -> tuple[int, ...]:
    """The shape of a tensor of an open safetensors file; none of its values are read.

    Raises:
        ValueError: the file does not hold it, or holds something else than floating-point numbers.
    """
    try:
        stored = file.get_slice(key)
    except SafetensorError:
        raise ValueError(f"{path} lacks {key}, which the index says it has") from None
    if (kind := stored.get_dtype()) not in FLOATS:
        raise ValueError(f"{path} holds {key} of type {kind}; expected floating-point numbers")
    return tuple(stored.get_shape())


def weight_files(folder: Path, stem: str) -> dict[str, Path]:
    """The safetensors file of each key in a component's folder.

    Args:
        folder: the component's folder, e.g. ``transformer``.
        stem: ``DIFFUSERS_STEM`` or ``TRANSFORMERS_STEM``.

    Raises:
        ValueError: there are no weights, or the index names a file that is absent or in another folder.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        return _indexed(folder, index)
    if not single.exists():
        raise ValueError(f"{folder} has neither {single.name} nor {index.name}; only safetensors weights are read")
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def text_weight_files(folder: Path) -> dict[str, Path]:
    """``weight_files`` of a ``text_encoder`` folder, with the word embedding under the first of ``EMBEDDING_KEYS`` too.

    Raises:
        ValueError: see ``weight_files``.
    """
    files = weight_files(folder, TRANSFORMERS_STEM)
    if (tied := files.get(EMBEDDING_KEYS[1])) is not None:
        files.setdefault(EMBEDDING_KEYS[0], tied)
    return files


def name_in_file(key: str, held: Collection[str]) -> str:
    """The name of a tensor of a text encoder in a file that holds these."""
    return EMBEDDING_KEYS[1] if key == EMBEDDING_KEYS[0] and key not in held else key


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index}: weight_map is {places!r:.60}; expected an object with the file of each tensor")
    for key, name in places.items():
        if not isinstance(name, str):
            raise ValueError(f"{index}: the file of {key[:200]} is {name!r:.60}; expected a name")
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"{index} names {name!r:.200}, which is not a file beside it")
        try:
            safe_reading.require_file(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{index} names {name}, which is missing") from None
    return {key: folder / name for key, name in places.items()}


def read_tensors(
    folder: Path,
    stem: str,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype,
    prefixes: tuple[str, ...] = ("",),
) -> dict[str, Tensor]:
    """Read the tensors of a component, which are exactly the expected ones.

    Args:
        folder, stem: see ``weight_files``.
        shapes: of the expected tensors, by key.
        dtype: to convert to.
        prefixes: tensors whose keys begin otherwise are ignored.

    Raises:
        ValueError: the first that is missing, unexpected or of another shape; or see ``weight_files``.
    """
    files = {key: path for key, path in weight_files(folder, stem).items() if key.startswith(prefixes)}
    if missing := sorted(shapes.keys() - files.keys()):
        raise ValueError(f"the weights in {folder} lack {missing[0]} (expected {list(shapes[missing[0]])})")
    if unexpected := sorted(files.keys() - shapes.keys()):
        raise ValueError(f"the weights in {folder} have {unexpected[0][:200]}, which Wan 2.1's have not")
    tensors = {}
    for path in sorted(set(files.values())):
        with open_weights(path) as file:
            for key in (key for key, place in files.items() if place == path):
                if (found := stored_shape(file, key, path)) != tuple(shapes[key]):
                    raise ValueError(f"{path} holds {key} of shape {list(found)}; expected {list(shapes[key])}")
                tensors[key] = file.get_tensor(key).to(dtype)
    return tensors


def _digest(folder: Path, stem: str, widths: Mapping[str, int]) -> str:
    """Digest of vectors that are small, so they are read quickly, and that differ between trained models.

    They are compared in bfloat16, so that a folder stored in that precision counts as the same model.
    """
    files, digest = weight_files(folder, stem), hashlib.sha256()
    found = [key for key in widths if key in files]
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(widths)}: its weights are not those of Wan 2.1")
    for key in found:
        with open_weights(files[key]) as file:
            if (shape := stored_shape(file, key, files[key])) != (widths[key],):
                raise ValueError(f"{files[key]} holds {key} of shape {list(shape)}; expected [{widths[key]}]")
            tensor: Tensor = file.get_tensor(key)
        digest.update(key.encode())
        digest.update(_bfloat16_bytes(tensor))
    return digest.hexdigest()[:16]


def _bfloat16_bytes(tensor: Tensor) -> bytes:
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def _text_encoder_digest(folder: Path, num_layers: int) -> str:
    """Digest of rows of the word embedding and of the matrices of the first and the last block.

    The vectors of ``_digest`` may be equal in encoders with other embeddings or other matrices. The rows are some
    megabytes of gigabytes, and compared in bfloat16 too.
    """
    files, digest = text_weight_files(folder), hashlib.sha256()
    blocks = [f"encoder.block.{number}.{key}" for number in (0, num_layers - 1) for key in _BLOCK_KEYS]
    with contextlib.ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for key, count in ((EMBEDDING_KEYS[0], _EMBEDDING_ROWS), *((key, _MATRIX_ROWS) for key in blocks)):
            if (path := files.get(key)) is None:
                raise ValueError(f"{folder} lacks {key}: its weights are not those of Wan 2.1's text encoder")
            if path not in opened:
                opened[path] = stack.enter_context(open_weights(path))
            name = name_in_file(key, opened[path].keys())
            shape = stored_shape(opened[path], name, path)
            if len(shape) != 2 or 0 in shape:
                raise ValueError(f"{path} holds {name} of shape {list(shape)}; expected a matrix")
            rows = opened[path].get_slice(name)
            digest.update(f"{key} {shape}".encode())
            for row in sorted({number * shape[0] // count for number in range(count)}):
                digest.update(_bfloat16_bytes(rows[row : row + 1, :_COLUMNS]))
    return digest.hexdigest()[:16]


def _tokenizer_digest(folder: Path) -> str | None:
    """Digest of a tokenizer's vocabulary and merges; None if there is no ``tokenizer.json``.

    Not of the file's bytes, in which every version of the tokenizers library writes the other parts differently.
    """
    file = folder / "tokenizer.json"
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _vocabulary_digest(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)  # a released one takes a second, and each half of a codec asks for it
def _vocabulary_digest(file: Path, mtime_ns: int, size: int) -> str:
    model = read_json(file).get("model")
    vocabulary, merges = (model.get(name) if isinstance(model, dict) else None for name in ("vocab", "merges"))
    if isinstance(vocabulary, dict):  # of BPE: the number of each token
        vocabulary = sorted(vocabulary.items(), key=lambda item: (str(item[1]), item[0]))
    if isinstance(merges, list):
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return hashlib.sha256(json.dumps([vocabulary, merges]).encode()).hexdigest()[:16]


def latent_spec_of(
    folder: Path, *, text_length: int = OFFICIAL_TEXT_LENGTH, vae: Path | None = None, text_encoder: Path | None = None
) -> LatentSpec:
    """The latent space of a model folder, from its configurations, its tokenizer, small tensors and rows of large ones.

    Args:
        folder: the model in diffusers' layout.
        text_length: tokens that prompts are cut to.
        vae, text_encoder: component folders outside ``folder``; the tokenizer is beside the text encoder.

    Raises:
        ValueError: files that are missing or describe another kind of autoencoder.
    """
    vae, text_encoder = vae or folder / "vae", text_encoder or folder / "text_encoder"
    file, text_file = vae / "config.json", text_encoder / "config.json"
    config, text_config = read_json(file), read_json(text_file)
    check_autoencoder(config, str(file))
    check_sizes(text_config, {name: TEXT_ENCODER[name] for name in ("d_model", "num_layers")}, str(text_file))
    channels, downsample, text_dim = config["z_dim"], config["temperal_downsample"], text_config["d_model"]
    base = config["base_dim"]
    vae_widths = {
        "encoder.conv_in.bias": base,
        "encoder.conv_out.bias": 2 * channels,
        "quant_conv.bias": 2 * channels,
        "decoder.conv_in.bias": (config.get("decoder_base_dim") or base) * config["dim_mult"][-1],
    }
    text_widths = dict.fromkeys(
        ("encoder.final_layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight"), text_dim
    )
    return LatentSpec(
        channels=channels,
        temporal_stride=2 ** sum(downsample),
        spatial_stride=2 ** len(downsample),
        mean=check_numbers(f"{file}: latents_mean", config.get("latents_mean"), channels),
        std=check_numbers(f"{file}: latents_std", config.get("latents_std"), channels, positive=True),
        text_dim=text_dim,
        text_length=text_length,
        model_id=(
            f"vae-{_digest(vae, DIFFUSERS_STEM, vae_widths)}"
            f"-text-{_digest(text_encoder, TRANSFORMERS_STEM, text_widths)}"
        ),
        tokenizer=_tokenizer_digest(text_encoder.parent / "tokenizer"),
        text_encoder=_text_encoder_digest(text_encoder, text_config["num_layers"]),
    )
