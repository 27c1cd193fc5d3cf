"""LoRA files, written as diffusers, ComfyUI and kohya's programs read them.

A format is a spelling of the keys and a place for the factor of B A:

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight         peft's configuration in the metadata
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_A.weight    an alpha for each linear: the factor is alpha / r
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight       the same

Readers of the last two know no rank stabilisation, so with it the alpha that they hold is alpha * sqrt(r). Of kohya's
files diffusers (at least to version 0.42) reads only those that change all ten linears of the blocks 0 to n.

Source: diffusers' ``save_lora_weights`` and ``lora_conversion_utils.py``; ComfyUI's ``comfy/lora.py``; musubi-tuner's
``networks/lora.py``.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from wan_model import __version__
from wan_model.config import WanConfig
from wan_model.dit.lora import DOWN, UP, LoraSettings, adapted_names, adapter_shapes
from wan_model.system.files import write_bytes
from wan_model.weights.lora_names import (
    COMFYUI_PREFIX,
    DIFFUSERS_PREFIX,
    METADATA_KEY,
    kohya_spelling,
    official_name,
)

# Precisions of A and B in a file; None for that of the given tensors.
DTYPES: dict[str, torch.dtype | None] = {"stored": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_TEXT = 200
# A name, or a hub id, which is an owner's and a model's.
_NAME = re.compile(r"[^/\\]+")
_NAME_OR_HUB_ID = re.compile(r"[^/\\]+|\w[\w.-]*/\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class LoraOrigin:
    """Where adapters come from, for a file's metadata; None for what is unknown.

    Names only: a file is given away, and paths tell about the machine.

    Attributes:
        base: the model that they change: the name of its folder, or its hub id.
        base_digest: hexadecimal digest of that model.
        run: name of the training run.
        step: its optimizer steps.
        software: that trained them, and its version.

    Raises:
        ValueError: a path instead of a name, or text that is no name, no digest or no number of steps.
    """

    base: str | None = None
    base_digest: str | None = None
    run: str | None = None
    step: int | None = None
    software: str = f"wan-model {__version__}"

    def __post_init__(self) -> None:
        hub = ", or the hub id owner/name"
        _check_text("base model", self.base, _NAME_OR_HUB_ID, f"a name without its path{hub}")
        _check_text("digest of the base model", self.base_digest, re.compile(r"[0-9a-f]+"), "hexadecimal digits")
        _check_text("run", self.run, _NAME, "a name without its path")
        _check_text("software", self.software, _NAME, "a name and a version")
        if self.step is not None and self.step < 0:
            raise ValueError(f"the step of the LoRA is {self.step}; expected 0 or more")

    def fields(self) -> dict[str, str]:
        """What is known, as metadata."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {f"wan.{name}": str(value) for name, value in known.items()}


def _check_text(what: str, value: str | None, pattern: re.Pattern[str], expected: str) -> None:
    if value is None:
        return
    usable = value.isprintable() and len(value) <= _LONGEST_TEXT and value not in (".", "..", "~")
    if not usable or not pattern.fullmatch(value):
        raise ValueError(f"the {what} of the LoRA is {value[:_LONGEST_TEXT]!r}; expected {expected}")


@torch.no_grad()
def save_lora(
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    config: WanConfig,
    path: Path,
    *,
    format: str = "diffusers",
    origin: LoraOrigin | None = None,
    dtype: str = "stored",
) -> None:
    """Write the adapters of a whole model as one safetensors file, atomically.

    Args:
        tensors: every A [r, in] and B [out, r], by diffusers' key: ``blocks.0.attn1.to_q.lora_A.weight``.
        settings: of the adapters.
        config: of the transformer that they change.
        path: of the file, which ends with ``.safetensors``; its folder is created if absent.
        format: ``diffusers``, ``comfyui`` or ``kohya``.
        origin: for the metadata, which have the settings too.
        dtype: ``stored`` for the tensors' own precision, ``bfloat16`` or ``float16``. Alphas are fp32.

    Raises:
        ValueError: an unknown format or precision, another ending, tensors that are missing, unknown, of another shape
            or type, or values that are not finite or that the precision cannot hold.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if format not in _FORMATS:
        raise ValueError(f"the format of the LoRA is {format!r}; expected one of {', '.join(_FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"the precision of the LoRA is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"the name of the LoRA is {path.name}; expected one that ends with .safetensors")
    shapes = adapter_shapes(config, settings)
    _check_tensors(tensors, shapes)
    own = {key: _stored(tensors[key], key, DTYPES[dtype]) for key in shapes}
    known = (origin or LoraOrigin()).fields()
    parts, fields = _FORMATS[format](own, settings, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(parts, metadata={"format": "pt", **known, **_settings_fields(settings), **fields})
    write_bytes(path, content)  # not save_file, whose errors are no OSError and whose files only their owner reads


def _check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    problems = [f"{key} is missing (expected {list(shape)})" for key, shape in shapes.items() if key not in tensors]
    for key, tensor in tensors.items():
        if key not in shapes:
            problems.append(f"{key} is unknown; expected those of the settings' targets only")
        elif tuple(tensor.shape) != shapes[key]:
            problems.append(f"{key} has the shape {list(tensor.shape)}; expected {list(shapes[key])}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is of type {tensor.dtype}; expected floating-point numbers")
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise ValueError(f"the tensors are not those of the LoRA: {problems[0]}{more}")


def _stored(tensor: Tensor, key: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor in its precision in the file, on the CPU."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{key} of the LoRA holds values that are not finite (NaN or infinity); the training diverged")
    converted = tensor if dtype is None else tensor.to(dtype)
    if not torch.isfinite(converted).all():
        largest = float(tensor.abs().max())
        raise ValueError(f"{key} of the LoRA holds {largest:.3g}, which {dtype} cannot hold; choose another precision")
    return converted.detach().cpu().contiguous()


def _alpha(settings: LoraSettings) -> float:
    return float(settings.rank if settings.alpha is None else settings.alpha)


def _alpha_over_rank(settings: LoraSettings) -> float:
    """The alpha of readers whose factor is alpha / r."""
    return _alpha(settings) * (math.sqrt(settings.rank) if settings.use_rslora else 1)


def _plain(value: float) -> int | float:
    """A whole number without its fraction, as peft and kohya's programs write it."""
    return int(value) if value.is_integer() else value


def _settings_fields(settings: LoraSettings) -> dict[str, str]:
    values = {
        "rank": settings.rank,
        "alpha": _plain(_alpha(settings)),
        "use_rslora": settings.use_rslora,
        "dropout": settings.dropout,
    }
    return {f"wan.{name}": json.dumps(value) for name, value in values.items()}


# -- the formats ------------------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]
Format = Callable[[Tensors, LoraSettings, Mapping[str, str]], tuple[Tensors, dict[str, str]]]


def _diffusers(own: Tensors, settings: LoraSettings, known: Mapping[str, str]) -> tuple[Tensors, dict[str, str]]:
    del known
    # Only fields that every version of peft has: it refuses a configuration with one that it does not know.
    peft: dict[str, Any] = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": _plain(_alpha(settings)),
        "use_rslora": settings.use_rslora,
        # Not that of the training: diffusers would drop values when it samples, as it leaves new layers in training.
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapted_names(own),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    named = {DIFFUSERS_PREFIX + field: value for field, value in peft.items()}
    written = json.dumps(named, indent=2, sort_keys=True)
    return {DIFFUSERS_PREFIX + key: tensor for key, tensor in own.items()}, {METADATA_KEY: written}


def _with_alphas(
    own: Tensors, settings: LoraSettings, spelling: Callable[[str], str], down: str, up: str
) -> dict[str, Tensor]:
    parts = {}
    for name in adapted_names(own):
        spelt = spelling(official_name(name))
        parts[f"{spelt}.{down}.weight"] = own[f"{name}.{DOWN}.weight"]
        parts[f"{spelt}.{up}.weight"] = own[f"{name}.{UP}.weight"]
        parts[f"{spelt}.alpha"] = torch.tensor(_alpha_over_rank(settings), dtype=torch.float32)
    return parts


def _comfyui(own: Tensors, settings: LoraSettings, known: Mapping[str, str]) -> tuple[Tensors, dict[str, str]]:
    del known
    return _with_alphas(own, settings, lambda name: COMFYUI_PREFIX + name, DOWN, UP), {}


def _kohya(own: Tensors, settings: LoraSettings, known: Mapping[str, str]) -> tuple[Tensors, dict[str, str]]:
    fields = {
        "ss_base_model_version": "wan",  # the architecture, of all models of Wan
        "ss_network_module": "networks.lora_wan",  # that reads the file
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": str(_plain(_alpha_over_rank(settings))),
        "ss_network_args": "{}",
    }
    same = {"ss_sd_model_name": "wan.base", "ss_steps": "wan.step"}
    fields |= {field: known[ours] for field, ours in same.items() if ours in known}
    return _with_alphas(own, settings, kohya_spelling, "lora_down", "lora_up"), fields


_FORMATS: dict[str, Format] = {"diffusers": _diffusers, "comfyui": _comfyui, "kohya": _kohya}
FORMATS = tuple(_FORMATS)
