"""LoRA of every dialect that diffusers reads for Wan, and of wan-train's checkpoints: reading, merging into weights.

A file holds, for some linears of the transformer, A [r, in] and B [out, r], and in some files an alpha, a change of the
bias, or whole changes of weights and biases (``diff``, ``diff_b``). The merged weight is W + scale * factor * B A, or
W + scale * diff; the factor is alpha / r, or 1 where the file gives no alpha. ``lora_keys`` has the spellings of the
keys, ``lora_config`` the factors that peft's configuration gives.

Everything in a file is merged or the file is refused. That includes what diffusers leaves out (at least to version
0.42): a ``diff`` or ``diff_b`` of norms and of the patch embedding, and the ``diff_b`` of ``time_projection`` without a
change of its weight.

Source: peft's ``LoraLayer``, diffusers' ``load_lora_weights`` and ``lora_conversion_utils.py``.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan_model.config import WanConfig
from wan_model.dit.lora import DOWN, UP, adapted_names, merged_weight, weight_change
from wan_model.dit.model import WanDiT
from wan_model.weights.lora_config import CONFIG_NAME, LoraConfig
from wan_model.weights.lora_keys import Part, made_by_peft, refuse_other_kinds, shown, spellings, split_key
from wan_model.weights.model_folder import FLOATS, open_weights
from wan_model.weights.run_settings import RUN_CONFIG
from wan_model.weights.transformer import expected_shapes, full_shape, local_slices, local_tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"

_INTEGERS = {"I8", "I16", "I32", "I64", "U8"}
# Widths of the released transformers.
_WIDTHS = {1536: "Wan 2.1's 1.3B model", 3072: "Wan 2.2's 5B model", 5120: "the 14B models of Wan 2.1 and 2.2"}

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LoraBase:
    """The model that a LoRA was trained on.

    Attributes:
        name: of its folder, or its hub id.
        digest: of its weights, see ``wan_model.weights.base_digest``.
    """

    name: str
    digest: str


@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """The changes of one file, by the key of the weight or bias that each is added to.

    Attributes:
        products: B [out, r], A [r, in] and the factor of B A.
        differences: a tensor of the weight's or bias's shape, and its factor.
        base: the model that it was trained on, where that is recorded, as wan-train does.
    """

    products: dict[str, tuple[Tensor, Tensor, float]]
    differences: dict[str, tuple[Tensor, float]]
    base: LoraBase | None = None

    @classmethod
    def of_adapters(cls, adapters: Mapping[str, Tensor], factor: float, base: LoraBase | None = None) -> "LoraWeights":
        """A LoRA of wan-train's: A and B of linears by diffusers' key, with the factor of all."""
        products = {
            f"{name}.weight": (adapters[f"{name}.{UP}.weight"], adapters[f"{name}.{DOWN}.weight"], factor)
            for name in adapted_names(adapters)
        }
        return cls(products, {}, base)

    def change(self, key: str, shape: Shape) -> Tensor:
        """The change of one weight or bias, fp32, of its shape; zeros if there is none."""
        if key in self.products:
            up, down, factor = self.products[key]
            return weight_change(down, up, factor).view(shape)
        if key in self.differences:
            difference, factor = self.differences[key]
            return difference.float() * factor
        return torch.zeros(shape)


@torch.no_grad()
def merge_loras(loras: Sequence[LoraWeights], model: WanDiT) -> None:
    """Add the changes of all files to a model's weights; sums are fp32, rounded once to the weight's precision.

    Raises:
        ValueError: a change is not finite.
    """
    for key in dict.fromkeys(key for lora in loras for key in (*lora.products, *lora.differences)):
        parameter = model.get_parameter(key)
        shape = full_shape(model, parameter)
        change = sum((lora.change(key, shape) for lora in loras), torch.zeros(shape))
        if not torch.isfinite(change).all():
            raise ValueError(f"the LoRA changes {key} to values beyond those of float32; check its scale and its alpha")
        held = local_tensor(parameter)
        held.copy_(merged_weight(held, change[local_slices(model, parameter)]))


def read_lora(path: str | os.PathLike[str], config: WanConfig, scale: float = 1.0) -> LoraWeights:
    """Read a safetensors file, a folder that has one, or a checkpoint of a LoRA run of wan-train's.

    Args:
        path: of one of these. In a folder the file is ``pytorch_lora_weights.safetensors``,
            ``adapter_model.safetensors``, or the only safetensors file; in that of a run it is the newest complete
            checkpoint.
        config: of the transformer.
        scale: factor of all changes in addition to alpha / r; 0 leaves the weights unchanged.

    Raises:
        ValueError: no such file, or tensors that are not a LoRA of this transformer, naming the first.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale of the LoRA {path} is {scale}; expected a finite number")
    path = find_lora(path)
    if path.is_dir():
        return _read_checkpoint(path, config, scale)
    with open_weights(path) as file:
        keys = sorted(file.keys())
        metadata = file.metadata() or {}
        stored = {key: file.get_slice(key) for key in keys}
        shapes = {key: tuple(piece.get_shape()) for key, piece in stored.items()}
        refuse_other_kinds(keys, str(path))
        peft = path.name == PEFT_WEIGHTS_NAME or made_by_peft(keys)
        lora_config = LoraConfig.read(metadata, path.with_name(CONFIG_NAME) if peft else None, str(path))
        file_keys, own_names = _by_weight(keys, config, str(path))
        wanted = expected_shapes(config)
        for name, parts in file_keys.items():
            _check_parts(name, parts, shapes, wanted, config, str(path))
        for key in keys:
            _check_type(key, stored[key].get_dtype(), str(path))
        tensors = {key: _finite(file.get_tensor(key), key, str(path)) for key in keys}
    return _assemble(file_keys, own_names, tensors, wanted, lora_config, scale, _stated_base(metadata))


def _stated_base(metadata: Mapping[str, str]) -> LoraBase | None:
    digest = metadata.get("wan.base_digest")
    return LoraBase(shown(metadata.get("wan.base", "a model without a name")), shown(digest)) if digest else None


def find_lora(path: str | os.PathLike[str]) -> Path:
    """The safetensors file, or the training checkpoint, that ``read_lora`` reads.

    Raises:
        ValueError: there is none, or a folder has several files.
    """
    path = Path(path)
    if path.is_dir() and ((path / RUN_CONFIG).exists() or any(path.glob("iter_*"))):
        # Half a second of imports that files do not need.
        from wan_model.weights.training_checkpoint import find_checkpoint

        return find_checkpoint(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
            if (path / name).exists():
                return path / name
        if len(found) > 1:
            names = ", ".join(shown(one.name) for one in found[:5])
            raise ValueError(f"{path} has {len(found)} safetensors files ({names}); give one of them")
        path = found[0] if found else path / WEIGHTS_NAME
    if not path.exists():
        raise ValueError(f"no LoRA at {path}: expected a safetensors file, or the checkpoints of a LoRA run")
    return path


def lora_name(path: Path) -> str:
    """How records and messages call what ``find_lora`` has found: without the rest of its path."""
    return f"{path.resolve().parent.name}/{path.name}" if path.is_dir() else path.name


def _read_checkpoint(path: Path, config: WanConfig, scale: float) -> LoraWeights:
    from wan_model.weights.training_adapters import find_adapters, read_adapters

    found = find_adapters(path)
    # Texts may be padded to another length than in the training of the LoRA, as with its file.
    if dataclasses.replace(found.config, text_length=config.text_length) != config:
        raise ValueError(
            f"the LoRA in {path} was trained on {found.base}, whose transformer has other sizes than this one of "
            f"{config.num_layers} layers and a width of {config.hidden_size}; give that model"
        )
    base = LoraBase(Path(found.base).name if Path(found.base).is_absolute() else found.base, found.base_digest)
    return LoraWeights.of_adapters(read_adapters(path), scale * found.settings.factor, base)


def _by_weight(keys: Sequence[str], config: WanConfig, where: str) -> tuple[dict[str, dict[Part, str]], dict[str, str]]:
    """The file's keys by the names of the weights that they change, and those names as the file spells them."""
    known = spellings(expected_shapes(config))
    found: dict[str, dict[Part, str]] = {}
    own_names: dict[str, str] = {}
    strange: list[str] = []
    unknown: list[str] = []
    for key in keys:
        split = split_key(key)
        if split is None:
            strange.append(key)
        elif split[0] not in known:
            unknown.append(key)
        else:
            own, part = split
            parts = found.setdefault(known[own], {})
            if part in parts:
                raise ValueError(f"{where} holds both {shown(parts[part])} and {shown(key)}, which are the same part")
            parts[part] = key
            own_names[known[own]] = own
    if strange:
        raise ValueError(
            f"{where} holds {shown(strange[0])}{_and_more(strange)}, which is no part of a LoRA that is read "
            "(lora_A and lora_B, lora_down and lora_up, alpha, diff, diff_b)"
        )
    if unknown:
        raise ValueError(
            f"{where} changes {shown(unknown[0])}{_and_more(unknown)}, which this transformer of {config.num_layers} "
            "layers does not have; is it for another model?"
        )
    if not found:
        raise ValueError(f"{where} changes nothing; expected a LoRA")
    return found, own_names


def _and_more(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more such keys)" if len(keys) > 1 else ""


def _check_parts(
    name: str,
    parts: Mapping[Part, str],
    shapes: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    config: WanConfig,
    where: str,
) -> None:
    """Refuse incomplete parts, and shapes that are not the weight's or bias's."""
    weight = f"{name}.weight" if f"{name}.weight" in wanted else name
    down, up = (shapes[parts[part]] if part in parts else None for part in ("down", "up"))
    if (down is None) != (up is None):
        raise ValueError(f"{where} holds only one of the two matrices (lora_A and lora_B) of {name}; expected both")
    if down is None and (alone := [key for part, key in parts.items() if part in ("alpha", "up_bias")]):
        raise ValueError(f"{where} holds {shown(alone[0])} without lora_A and lora_B; expected both")
    if "diff" in parts and down is not None:
        raise ValueError(f"{where} holds both {shown(parts['diff'])} and {shown(parts['down'])}; expected one of them")
    if "diff_b" in parts and "up_bias" in parts:
        raise ValueError(
            f"{where} holds both {shown(parts['diff_b'])} and {shown(parts['up_bias'])}; expected one of them"
        )
    if "alpha" in parts and math.prod(shapes[parts["alpha"]]) != 1:
        got = list(shapes[parts["alpha"]])
        raise ValueError(f"{shown(parts['alpha'])} in {where} has the shape {got}; expected one number")
    if down is not None and up is not None:
        _check_product(weight, down, up, wanted[weight], config, where)
    for part, file_key in parts.items():
        if part not in ("diff", "diff_b", "up_bias"):
            continue
        key = weight if part == "diff" else f"{name}.bias"
        if key not in wanted:
            raise ValueError(f"{where} holds {shown(file_key)}, but there is no {key}; is it for another model?")
        if shapes[file_key] != wanted[key]:
            raise ValueError(
                f"{where} changes {key} of shape {list(wanted[key])} by {list(shapes[file_key])}, which does not fit; "
                f"{_guess(name, shapes[file_key], config)}"
            )


def _check_product(weight: str, down: Shape, up: Shape, wanted: Shape, config: WanConfig, where: str) -> None:
    if len(wanted) < 2:
        raise ValueError(f"{where} changes {weight}, which is no matrix, by a product of two; is it for another model?")
    plain = len(down) in (2, len(wanted)) and len(up) in (2, len(wanted)) and set(up[2:]) <= {1}
    if plain and down[0] == 0:
        raise ValueError(f"{where} changes {weight} by matrices of rank 0; expected a rank of 1 or more")
    # A convolution's columns are its channels and kernel, in this order, or one flat number.
    columns = len(down) == 2 and down[1] == math.prod(wanted[1:])
    if plain and down[0] == up[1] and up[0] == wanted[0] and (columns or down[1:] == wanted[1:]):
        return
    raise ValueError(
        f"{where} changes {weight} of shape {list(wanted)} by {list(up)} times {list(down)}, which does not fit; "
        f"{_guess(weight, (*up[:1], *down[1:]), config)}"
    )


def _guess(name: str, got: Shape, config: WanConfig) -> str:
    """Which model a change of another shape may be for."""
    channels = math.prod(got[1:]) // config.patch_volume
    if name.startswith("patch_embedding") and len(got) > 1 and channels != config.in_channels:
        other = {36: "an image-to-video model", 48: _WIDTHS[3072]}.get(channels)
        return f"it has {channels} input channels, {f'as {other} has' if other else 'as another model has'}"
    for width in got:
        if width in _WIDTHS and width != config.hidden_size:
            return f"its width of {width} is that of {_WIDTHS[width]}"
    return "is it for another model?"


def _check_type(key: str, dtype: str, where: str) -> None:
    if dtype not in FLOATS and not (dtype in _INTEGERS and key.endswith(".alpha")):
        raise ValueError(f"{shown(key)} in {where} is of type {dtype}; expected floating-point numbers")


def _finite(tensor: Tensor, key: str, where: str) -> Tensor:
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{shown(key)} in {where} holds values that are not finite (NaN or infinity)")
    return tensor


def _assemble(
    file_keys: Mapping[str, Mapping[Part, str]],
    own_names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Shape],
    config: LoraConfig | None,
    scale: float,
    base: LoraBase | None,
) -> LoraWeights:
    ranks = {name: tensors[parts["down"]].shape[0] for name, parts in file_keys.items() if "down" in parts}
    # A file's own alphas count before a configuration's.
    stated = {name: float(tensors[parts["alpha"]]) for name, parts in file_keys.items() if "alpha" in parts}
    factors: dict[str, float] = {} if config is None else config.factors(ranks, own_names)
    factors |= {name: alpha / ranks[name] for name, alpha in stated.items()}
    found = LoraWeights({}, {}, base)
    for name, parts in file_keys.items():
        weight = f"{name}.weight" if f"{name}.weight" in wanted else name
        factor = scale * factors.get(name, 1.0)
        if "down" in parts:
            # Those of a convolution have its kernel's axes.
            found.products[weight] = (tensors[parts["up"]].flatten(1), tensors[parts["down"]].flatten(1), factor)
        if "up_bias" in parts:
            found.differences[f"{name}.bias"] = (tensors[parts["up_bias"]], factor)
        if "diff" in parts:
            found.differences[weight] = (tensors[parts["diff"]], scale)
        if "diff_b" in parts:
            found.differences[f"{name}.bias"] = (tensors[parts["diff_b"]], scale)
    return found
