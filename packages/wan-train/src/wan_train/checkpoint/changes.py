"""What a resumed run may change, compared with the configuration that its checkpoint records.

Every other setting takes effect at a resume; RESUMING.md lists those that people change, and a test reads it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from wan_model.config import TEXT_LENGTH_KEY
from wan_model.weights.run_settings import read_run_settings
from wan_model.weights.training_checkpoint import read_run_config
from wan_train.checkpoint.folder import ResumePoint
from wan_train.model.layout import Layout

_KEYS = {"text_length": TEXT_LENGTH_KEY}
_LOADER_STATE = re.compile(r"train_dataloader_dprank\d+\.pt")
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class FixedSetting:
    """A setting that a resumed run must have as its checkpoint records it.

    Attributes:
        key: of the configuration.
        reason: why it cannot change.
        with_data: whether it concerns runs on a dataset only; mock data are made anew from any settings.
    """

    key: str
    reason: str
    with_data: bool = False


_ORDER = "the loader continues the order of samples that it began"
_STATE = "the optimizer's state has its form"
FIXED = (
    FixedSetting("train.global_batch_size", "steps, schedule and position in the data are counted in it"),
    FixedSetting("dataset.mock", "there is no position to continue from"),
    FixedSetting("dataset.capacity", _ORDER, with_data=True),
    FixedSetting("dataset.packing_buffer", _ORDER, with_data=True),
    FixedSetting("dataset.shuffle_buffer", _ORDER, with_data=True),
    FixedSetting("dataset.num_workers", _ORDER, with_data=True),
    FixedSetting("dataset.seed", _ORDER, with_data=True),
    FixedSetting("mixed_precision", _STATE),
    FixedSetting("optimizer.use_distributed_optimizer", _STATE),
    FixedSetting("optimizer.use_precision_aware_optimizer", _STATE),
    FixedSetting("model.init_from", "the run has begun, and the weights continue from the checkpoint"),
    FixedSetting("lora.init_from", "the run has begun, and the LoRA continues from the checkpoint"),
    FixedSetting("model.init_seed", "the run has begun, and the weights continue from the checkpoint"),
)


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, _MISSING) if isinstance(values, Mapping) else getattr(values, name, _MISSING)
        if values is _MISSING:
            return _MISSING
    return values


def _of_config(config: Any, key: str) -> Any:
    if key == "mixed_precision":
        return None if config.mixed_precision is None else "bf16_mixed"
    return _at(config, key)


def _of_record(record: Mapping[str, Any], key: str) -> Any:
    if key == "mixed_precision":  # Megatron has made a section of it
        return "bf16_mixed" if _at(record, "model.bf16") is True else None
    if key == "lora.init_from":  # runs of earlier versions began without
        return None if (began := _at(record, key)) is _MISSING else began
    return _at(record, key)


def _changed(config: Any, record: Mapping[str, Any]) -> list[tuple[FixedSetting, Any, Any]]:
    """The settings that must not differ and do: each with this run's value and the recorded one."""
    mock = config.dataset.mock and _at(record, "dataset.mock") is True
    found = []
    for setting in FIXED:
        if setting.key == "model.init_from" and config.model.recorded_digest is not None:
            continue  # the base of adapters, which may have moved: its digest is compared when it is read
        ours, theirs = _of_config(config, setting.key), _of_record(record, setting.key)
        # A record of another version of Megatron may lack the key.
        if theirs is _MISSING or ours is _MISSING or (setting.with_data and mock) or ours == theirs:
            continue
        found.append((setting, ours, theirs))
    return found


def new_run_from(point: ResumePoint) -> str:
    """Advice where a run cannot be continued."""
    return (
        f"start a new run from its weights: checkpoint.load={point.folder} checkpoint.finetune=true and another "
        "checkpoint.save"
    )


def check_resume(config: Any, layout: Layout, point: ResumePoint) -> None:
    """Refuse a checkpoint that this configuration cannot continue; ``model.init_from`` is taken over from it.

    Args:
        config: the configuration of this run, before Megatron completes it.
        layout: of this run.
        point: the checkpoint that it loads.

    Raises:
        ValueError: the checkpoint is of another format, of other model sizes or another latent space; or, unless only
            its weights are used (``checkpoint.finetune``), a setting differs that cannot change.
    """
    record = read_run_settings(point.step_folder)
    _check_weights(config, point, record)
    _check_adapters(config, point, record)
    if config.checkpoint.finetune:
        if config.lora.init_from is not None:
            raise ValueError(
                f"lora.init_from is {config.lora.init_from} and checkpoint.finetune takes the LoRA of "
                f"{point.step_folder}; leave one of them out"
            )
        if config.model.init_from is not None and not config.lora.trains:
            raise ValueError(
                f"model.init_from is {config.model.init_from} and checkpoint.finetune takes the weights of "
                f"{point.step_folder}; leave one of them out"
            )
        return
    anew = f"or {new_run_from(point)}"
    if _at(record, "checkpoint.save_optim") is False:
        raise ValueError(
            f"{point.step_folder} was saved with checkpoint.save_optim=false, so a run cannot continue from it; "
            f"{new_run_from(point)}"
        )
    if config.model.init_from is None and isinstance(began := _at(record, "model.init_from"), str):
        config.model.init_from = began  # recorded in the checkpoints of this run too
    if config.lora.init_from is None and isinstance(began := _at(record, "lora.init_from"), str):
        config.lora.init_from = began
    if changed := _changed(config, record):
        setting, ours, theirs = changed[0]
        others = "".join(f"; {also.key} is {mine!r} where it has {its!r}" for also, mine, its in changed[1:])
        raise ValueError(
            f"{setting.key} is {ours!r} where {point.step_folder} has {theirs!r}{others}; a resume cannot change "
            f"{setting.key} because {setting.reason}: set it as it was, {anew}"
        )
    ranks = sum(_LOADER_STATE.fullmatch(name) is not None for name in point.files)
    if ranks and ranks != layout.data:
        raise ValueError(
            f"the data-parallel size is {layout.data} where {point.step_folder} has {ranks}, which a resume cannot "
            "change because each rank continues its own samples: resume with the data-parallel size that it was saved "
            f"with, {anew}"
        )


def _check_adapters(config: Any, point: ResumePoint, record: dict[str, Any]) -> None:
    """Refuse a checkpoint of weights where adapters are trained, and of adapters otherwise or of another form."""
    lora, theirs = config.lora, _at(record, "lora.rank")
    theirs = 0 if theirs is _MISSING else theirs
    if not lora.trains and theirs:
        raise ValueError(
            f"{point.step_folder} holds a LoRA of rank {theirs} and lora.rank is 0; set the lora section as it was, or "
            f"merge it first: wan-train merge {point.folder} MODEL, then --init-from MODEL"
        )
    if lora.trains and not theirs:
        trained = f"lora.rank is {lora.rank}" if lora.rank else f"lora.init_from is {lora.init_from}"
        raise ValueError(
            f"{point.step_folder} holds the weights of a model and {trained}; export them first: "
            f"wan-train export {point.folder} MODEL, then --init-from MODEL and another checkpoint.save"
        )
    if not lora.trains:
        return
    if lora.init_from is not None:
        _complete_lora(lora, record)
    for key in ("rank", "targets", "alpha", "use_rslora"):
        ours, its = getattr(lora, key), _at(record, f"lora.{key}")
        if ours == its or (key == "alpha" and (ours or lora.rank) == (its or theirs)):
            continue
        raise ValueError(
            f"lora.{key} is {_yaml(ours)} where {point.step_folder} has {_yaml(its)}, which would be another LoRA; set "
            "it as it was, or set checkpoint.save to another folder"
        )
    recorded = _at(record, "model.base_digest")
    config.model.recorded_digest = recorded if isinstance(recorded, str) else None


def _complete_lora(lora: Any, record: dict[str, Any]) -> None:
    """What the run took from the LoRA that it began with, the checkpoint has; the file is not read again."""
    fresh = type(lora)()
    for key in ("rank", "targets", "alpha"):
        if getattr(lora, key) == getattr(fresh, key) and (its := _at(record, f"lora.{key}")) is not _MISSING:
            setattr(lora, key, its)


def _yaml(value: Any) -> str:
    return "null" if value is None else repr(value)


def _check_weights(config: Any, point: ResumePoint, record: dict[str, Any]) -> None:
    """Refuse a checkpoint of another format, of other model sizes, or of another latent space than the data's."""
    transformer, spec = read_run_config(point.step_folder, record)
    theirs = _at(record, "dist.use_megatron_fsdp") is True
    if theirs != bool(config.dist.use_megatron_fsdp):
        write = "merge" if _at(record, "lora.rank") not in (0, _MISSING) else "export"
        raise ValueError(
            f"{point.step_folder} was saved with dist.use_megatron_fsdp={str(theirs).lower()}, whose format the other "
            f"cannot read; set it so, or start anew from what it trained: wan-train {write} {point.folder} MODEL, then "
            "--init-from MODEL"
        )
    ours = config.model.wan_config
    if differing := [
        f"{_KEYS.get(name, name)} {mine} where it has {its}"
        for name, mine in dataclasses.asdict(ours).items()
        if mine != (its := getattr(transformer, name))
    ]:
        raise ValueError(
            f"{point.step_folder} has another transformer than this run: {', '.join(differing)}; set "
            "model.transformer as it was, or set checkpoint.save to another folder"
        )
    if spec is not None and config.model.spec is not None:
        spec.require_same(config.model.spec, f"the checkpoint {point.step_folder}", f"the data {config.dataset.path}")
