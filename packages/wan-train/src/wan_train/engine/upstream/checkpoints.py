"""Where the hooks of ``wan_train.checkpoint`` are placed in Megatron-Bridge.

Import only after ``wan_train.engine.start``.

Bridge 0.3 calls ``save_checkpoint`` and ``load_checkpoint`` where they were imported, from 0.4 on its
``DefaultCheckpointManager`` calls them where they are defined.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.bridge.training.state import TrainState
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.safe_globals import register_safe_globals
from megatron.core.utils import unwrap_model

from wan_train.engine.upstream.replace import by, changed, find, mentions, nothing, replace

__all__ = [
    "SAFE_SAVES",
    "CheckpointingException",
    "is_fully_sharded",
    "keep_settings",
    "place_hooks",
    "register_safe_globals",
    "restore_train_state",
    "unwrap_model",
    "use_read_weights",
]

_BRIDGE = "megatron.bridge.training"
_CHECKPOINTING = f"{_BRIDGE}.checkpointing"
_MANAGER = f"{_CHECKPOINTING}:DefaultCheckpointManager"
_SAVES = f"{_BRIDGE}.train:save_checkpoint_and_time"
SAFE_SAVES, _EXACT = "saves that a crash cannot damage", "an exact resume"
_NO_CODE = "reading checkpoints without executing code"

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def place_hooks(
    *,
    save: Wrapper,
    schedule: Wrapper,
    load: Wrapper,
    exists: Callable[[Any], bool],
    load_weights: Callable[..., None],
    tracker: Wrapper,
) -> None:
    """Make the loop save and load through these functions; once per process.

    Args:
        save: makes the replacement of ``save_checkpoint(state, model, optimizer, ...)``.
        schedule: of ``schedule_async_save(state, request)``.
        load: of ``load_checkpoint(state, model, ...)``.
        exists: replaces ``checkpoint_exists(path)``.
        load_weights: replaces ``_load_model_state_dict(module, state, strict)``.
        tracker: makes the replacement of ``get_checkpoint_train_state_filename(folder, prefix)``; with a prefix, that
            is the file from which the step to load is taken.

    Raises:
        EngineChangedError: one of them cannot be placed, or would not be called.
    """
    _verify_the_way_to_a_save()
    replace(f"{_CHECKPOINTING}:save_checkpoint", save, SAFE_SAVES, called_by=(f"{_MANAGER}.save", _SAVES))
    saves = (f"{_CHECKPOINTING}:save_checkpoint",)
    replace(f"{_CHECKPOINTING}:schedule_async_save", schedule, SAFE_SAVES, called_by=saves)
    # Its retention can delete the only complete checkpoint.
    cleanup = f"{_CHECKPOINTING}:cleanup_old_non_persistent_checkpoint"
    replace(cleanup, by(nothing), SAFE_SAVES, called_by=saves)

    loads = (f"{_MANAGER}.load", f"{_BRIDGE}.setup:setup")
    replace(f"{_CHECKPOINTING}:load_checkpoint", load, _EXACT, called_by=loads)
    _verify_how_it_reads()
    reads = (f"{_CHECKPOINTING}:_load_checkpoint_from_path",)
    replace(f"{_CHECKPOINTING}:_load_model_state_dict", by(load_weights), _EXACT, called_by=reads)
    replace(f"{_CHECKPOINTING}:get_checkpoint_train_state_filename", tracker, _EXACT, called_by=reads)
    _place_exists(exists)


def _place_exists(exists: Callable[[Any], bool]) -> None:
    """Replace ``checkpoint_exists``, which looks for Bridge's tracker files, where setup asks whether to load."""
    import megatron.bridge.training.setup as setup

    asks = vars(setup).get("_should_load_checkpoint", vars(setup).get("setup"))
    if asks is None or not (hasattr(setup, "checkpoint_exists") and mentions(asks, "checkpoint_exists")):
        raise changed(f"{setup.__name__} does not ask checkpoint_exists whether to load", _EXACT)
    setup.checkpoint_exists = exists


def _verify_the_way_to_a_save() -> None:
    """The loop saves by one function, which calls Bridge's ``save_checkpoint`` or the manager that does."""
    function, calls = find(_SAVES), "save_checkpoint" if find(_MANAGER) is None else "save"
    if function is None or not mentions(function, calls):
        raise changed(f"the training loop does not save by {_SAVES}", SAFE_SAVES)


def _verify_how_it_reads() -> None:
    """Megatron-Core leaves reading pickles to the functions of torch that ``read_without_code`` replaces."""
    strategies = "megatron.core.dist_checkpointing.strategies"
    reader = f"{strategies}.cached_metadata_filesystem_reader:CachedMetadataFileSystemReader"
    reads = find(f"{reader}.read_metadata")
    if find(reader) is None or not (reads is None or mentions(reads, "read_metadata")):
        raise changed(f"{reader} does not read the metadata as torch does", _NO_CODE)
    planner = f"{strategies}.torch:MCoreLoadPlanner"
    if find(planner) is None or find(f"{planner}.load_bytes") is not None:
        raise changed(f"{planner} does not read objects as torch does", _NO_CODE)


def is_fully_sharded(module: torch.nn.Module) -> bool:
    """Whether a module is Megatron-FSDP's, whose tensors a checkpoint is read into."""
    return isinstance(module, MegatronFSDP)


def restore_train_state(saved: Mapping[str, Any]) -> TrainState:
    """The loop's counters from the content of ``train_state.pt``."""
    state = TrainState()
    state.load_state_dict(dict(saved))
    return state


def use_read_weights(model: list[torch.nn.Module]) -> None:
    """Make Megatron-FSDP compute with the weights that were read.

    They are read into the copy that the optimizer updates; Bridge 0.4 leaves the initial ones in the other copy.

    Raises:
        EngineChangedError: Megatron-FSDP cannot be told to.
    """
    for module in [module for part in model for module in part.modules() if is_fully_sharded(module)]:
        use: Any = getattr(module, "install_optimized_model_weights", None)
        if use is None:
            raise changed("Megatron-FSDP has no install_optimized_model_weights", _EXACT)
        use()


# What a group of parameters has that is not a setting: its parameters, the steps of fused optimizers, and what the
# scheduler computes.
_NO_SETTINGS = frozenset({"params", "step", "lr", "weight_decay"})


def _settings(optimizer: Any) -> dict[str, Any]:
    """The settings that all groups of parameters have in common: learning rates, betas, eps and so on."""
    groups = [{key: value for key, value in group.items() if key not in _NO_SETTINGS} for group in _groups(optimizer)]
    first = groups[0] if groups else {}
    return {key: value for key, value in first.items() if all(key in group and group[key] == value for group in groups)}


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group]  # Megatron has empty ones for other ranks' parameters


def _set_in_state(state: Any, settings: dict[str, Any]) -> None:
    """Set them in each group of a state, which has its groups as a list, or with FSDP by name of the parameter."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key == "param_groups" and isinstance(value, list):
            groups = value
        elif key == "param_to_group_meta" and isinstance(value, dict):
            groups = list(value.values())
        else:
            _set_in_state(value, settings)
            continue
        for group in groups:
            if isinstance(group, dict):
                group.update({name: content for name, content in settings.items() if name in group})


@contextlib.contextmanager
def keep_settings(optimizer: Any) -> Iterator[None]:
    """In this context the optimizer keeps its settings when it loads a state; stock Megatron takes those of the state.

    ``override_opt_param_scheduler`` does not help: the scheduler prefers the learning rates in the groups to its own.
    They are set before the optimizer reads them, because Core 0.19 finds a group by them.

    Raises:
        EngineChangedError: after the load, if it has other settings.
    """
    wanted = {} if optimizer is None else _settings(optimizer)
    if not wanted:
        yield
        return
    load = optimizer.load_state_dict

    def load_with_own_settings(state: Any) -> None:
        _set_in_state(state, wanted)
        load(state)

    optimizer.load_state_dict = load_with_own_settings
    try:
        yield
    finally:
        del optimizer.load_state_dict
    if any(group.get(key) != value for group in _groups(optimizer) for key, value in wanted.items()):
        raise changed("its optimizer takes the settings of a checkpoint", "settings that change at a resume")
