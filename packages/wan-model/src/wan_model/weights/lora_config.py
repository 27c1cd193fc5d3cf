"""The configuration of a LoRA as peft records it: the alpha, the rank and their patterns, and rank stabilisation.

diffusers writes it as JSON into the file's metadata (``lora_adapter_metadata``), peft into ``adapter_config.json``
beside the file. The factor of a linear's B A is alpha / r, or alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern``
and ``rank_pattern`` give the linears whose names match a regular expression an alpha and a rank of their own.

Source: peft's ``LoraConfig`` and ``LoraLayer.update_layer``.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wan_model.system.safe_reading import parse_json, read_text
from wan_model.weights.lora_keys import refuse_stated_models, shown
from wan_model.weights.lora_names import DIFFUSERS_PREFIX, METADATA_KEY
from wan_model.weights.lora_patterns import match_patterns

CONFIG_NAME = "adapter_config.json"

_PEFT_ALPHA = 8.0  # of a configuration without lora_alpha
_MOST_CHARACTERS, _MOST_PATTERNS, _LONGEST_PATTERN = 2**22, 4096, 1000
# Variants whose result is not W + factor * B A, or that change the base model before. False, empty and null are none.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
# The others (pissa, olora, corda, loftq and so on) subtract something from the base model's weights.
_INITIALISATIONS_OF_THE_ADAPTER: tuple[object, ...] = (True, False, "gaussian", "eva", "orthogonal")
# Fields of safetensors metadata in which trainers name the model.
_STATED_MODELS = ("modelspec.architecture", "ss_base_model_version")

Value = TypeVar("Value", int, float)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What a file's configuration says of its linears.

    Attributes:
        where: the file or the metadata that has it, for messages.
        rank, alpha: of linears that no pattern matches; ranks are only compared with those of the tensors.
        rank_pattern, alpha_pattern: by regular expression.
        rank_stabilised: the factor is alpha / sqrt(r).
    """

    where: str
    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool

    @classmethod
    def read(cls, metadata: Mapping[str, str], beside: Path | None, where: str) -> "LoraConfig | None":
        """The configuration of a file, or None if it has none.

        Args:
            metadata: of the safetensors file.
            beside: peft's ``adapter_config.json``, which is read if the metadata has none and it exists.
            where: the safetensors file.

        Raises:
            ValueError: values of another kind than peft's, or a variant of LoRA that is not supported.
        """
        refuse_stated_models({field: metadata[field] for field in _STATED_MODELS if field in metadata}, where)
        if text := metadata.get(METADATA_KEY):
            return cls._parse(text, f"{METADATA_KEY} of {where}")
        if beside is None or not beside.exists():
            return None
        return cls._parse(read_text(beside), str(beside))

    @classmethod
    def _parse(cls, text: str, where: str) -> "LoraConfig | None":
        given = _json_object(text, where)
        # diffusers' pipelines write the component's name before each field, its models do not.
        prefix = DIFFUSERS_PREFIX if any(key.startswith(DIFFUSERS_PREFIX) for key in given) else ""
        own = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        if not own:
            return None
        if own.get("peft_type") not in (None, "LORA"):
            raise ValueError(f"{where} is of the type {own['peft_type']!r:.100}; only LoRA is supported")
        for name in _VARIANTS:
            if own.get(name):
                kind = "a DoRA (use_dora)" if name == "use_dora" else f"a variant of LoRA ({name})"
                raise ValueError(f"{where} is of {kind}, which is not supported; only plain LoRA is")
        start = own.get("init_lora_weights", True)
        if not isinstance(start, bool | str) or start not in _INITIALISATIONS_OF_THE_ADAPTER:
            raise ValueError(
                f"init_lora_weights of {where} is {start!r:.100}, which changes the base model too; save the adapter "
                "with peft's path_initial_model_for_weight_conversion"
            )
        if isinstance(model := own.get("base_model_name_or_path"), str):
            # Not the folders of a path, which may be named after anything.
            refuse_stated_models({"base_model_name_or_path": Path(model).name}, where)
        return cls(
            where,
            None if own.get("r") is None else _rank(own["r"], "r", where),
            _alpha(own.get("lora_alpha", _PEFT_ALPHA), "lora_alpha", where),
            {key: _rank(value, f"rank_pattern {shown(key)}", where) for key, value in _patterns(own, "rank", where)},
            {key: _alpha(value, f"alpha_pattern {shown(key)}", where) for key, value in _patterns(own, "alpha", where)},
            _flag(own.get("use_rslora"), "use_rslora", where),
        )

    def factors(self, ranks: Mapping[str, int], own_names: Mapping[str, str]) -> dict[str, float]:
        """The factor of each linear's B A.

        Args:
            ranks: of the tensors, by the linears' names.
            own_names: the linears' names in the file, which patterns may have been written for.

        Raises:
            ValueError: a rank that is not that of the tensors, or patterns that cannot be matched.
        """
        names, found = list(ranks), {}
        own_rank = _matched(self.rank_pattern, names, own_names, self.where)
        own_alpha = _matched(self.alpha_pattern, names, own_names, self.where)
        for name, rank in ranks.items():
            stated = own_rank.get(name, self.rank)
            if stated is not None and stated != rank:
                raise ValueError(
                    f"{self.where} gives {name} the rank {stated}, but its tensors have the rank {rank}: "
                    "it belongs to another file"
                )
            found[name] = own_alpha.get(name, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)
        return found


def _matched(
    values: Mapping[str, Value], names: Sequence[str], own_names: Mapping[str, str], where: str
) -> dict[str, Value]:
    """The value of the first pattern that matches, for the names that one matches.

    A name is tried as the file spells it, then as diffusers does.
    """
    if not values:
        return {}
    patterns = list(values)
    found = match_patterns(patterns, [*(own_names[name] for name in names), *names], where)
    matched = {}
    for name, own, ours in zip(names, found[: len(names)], found[len(names) :], strict=True):
        if (index := ours if own is None else own) is not None:
            matched[name] = values[patterns[index]]
    return matched


def _json_object(text: str, where: str) -> dict[str, Any]:
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{where} has over {_MOST_CHARACTERS} characters; expected a configuration of peft")
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a JSON {type(value).__name__}; expected an object, a configuration of peft")
    return value


def _rank(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} of {where} is {value!r:.100}; expected a rank, an integer of 1 or more")
    return value


def _alpha(value: object, name: str, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{name} of {where} is {value!r:.100}; expected a finite number")


def _flag(value: object, name: str, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} of {where} is {value!r:.100}; expected true or false")
    return bool(value)


def _patterns(own: Mapping[str, Any], kind: str, where: str) -> list[tuple[str, object]]:
    value = own.get(f"{kind}_pattern") or {}
    if not isinstance(value, dict):
        raise ValueError(f"{kind}_pattern of {where} is a JSON {type(value).__name__}; expected an object")
    if len(value) > _MOST_PATTERNS or any(len(pattern) > _LONGEST_PATTERN for pattern in value):
        raise ValueError(
            f"{kind}_pattern of {where} has over {_MOST_PATTERNS} patterns, or one of over {_LONGEST_PATTERN} "
            "characters; expected fewer and shorter ones"
        )
    return list(value.items())
