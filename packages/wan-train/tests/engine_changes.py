"""Changes to Megatron-Bridge such as another version may have, called in a rank before it trains (``warm_ranks.Call``).

Those named ``after_placing`` happen once the hooks are placed, where nothing could notice them before the run.
"""

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

BRIDGE = "megatron.bridge.training"


def _after_placing(change: Callable[[Any], None]) -> None:
    """Apply a change once the hooks are placed; it gets the function that saved before."""
    import megatron.bridge.training.checkpointing as checkpointing

    from wan_train.checkpoint.hooks import CheckpointHooks

    install, save = CheckpointHooks.install, checkpointing.save_checkpoint

    @functools.wraps(install)
    def install_and_change(self: CheckpointHooks) -> None:
        install(self)
        change(save)

    CheckpointHooks.install = install_and_change  # type: ignore[method-assign]


def _everywhere(name: str, function: Any) -> None:
    for module in [one for key, one in sys.modules.items() if key.startswith(BRIDGE)]:
        if name in vars(module):
            setattr(module, name, function)


def saves_behind_the_padding() -> None:
    """Optimizer states are saved as Megatron-Core does it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "sharded_param_state_fully_reshardable"
    setattr(DistributedOptimizer, name, vars(DistributedOptimizer)[name].__wrapped__)


def no_initial_weights() -> None:
    """Initial weights can be neither drawn nor read; memory that is not initialised is not a number."""
    import torch

    from wan_train.model import provider

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("initial weights are made although a checkpoint has all weights")

    provide = provider.WanModelProvider.provide

    @functools.wraps(provide)
    def provide_undefined(self: Any, *arguments: Any, **options: Any) -> Any:
        model = provide(self, *arguments, **options)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return model

    provider.init_weights = provider.load_weights = refuse  # type: ignore[attr-defined]
    provider.WanModelProvider.provide = provide_undefined  # type: ignore[method-assign]


def saves_under_another_name() -> None:
    """The loop imports a function of another name."""
    import megatron.bridge.training.train as train

    def write_state(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("refused before")

    train.write_state = write_state
    source = "def save_checkpoint_and_time(*args, **kwargs): write_state(*args, **kwargs)"
    exec(source, vars(train))


def saves_from_another_module() -> None:
    """The function that saves is called where nothing was replaced."""
    import megatron.bridge.training.checkpointing as checkpointing
    import megatron.bridge.training.train as train

    elsewhere = types.ModuleType("elsewhere")
    vars(elsewhere)["save_checkpoint"] = checkpointing.save_checkpoint
    manager = getattr(checkpointing, "DefaultCheckpointManager", None)
    exec("def save(*args, **kwargs): save_checkpoint(*args, **kwargs)", vars(elsewhere))
    if manager is None:
        train.save_checkpoint_and_time = vars(elsewhere)["save"]
    else:
        manager.save = vars(elsewhere)["save"]


def has_lost(module: str, name: str) -> None:
    """A function that is replaced is not there."""
    delattr(sys.modules[f"{BRIDGE}.{module}"], name)


def saves_past_the_hook_after_placing() -> None:
    """The function that saves is the original one again."""
    _after_placing(lambda save: _everywhere("save_checkpoint", save))


def saves_nothing_after_placing() -> None:
    """The loop does not save."""
    _after_placing(lambda save: _everywhere("save_checkpoint_and_time", lambda *args, **kwargs: None))


def schedules_past_the_hook_after_placing() -> None:
    """An asynchronous save is scheduled by another function, so that nothing would complete it."""
    import megatron.bridge.training.checkpointing as checkpointing

    schedule = checkpointing.schedule_async_save
    _after_placing(lambda save: _everywhere("schedule_async_save", schedule))


def loads_nothing_after_placing() -> None:
    """The loop finds no checkpoint to load."""
    _after_placing(lambda save: _everywhere("checkpoint_exists", lambda path: False))


def cannot_read_the_checkpoint() -> None:
    """Core does not know how another version has written it."""
    import megatron.bridge.training.checkpointing as checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CheckpointingException("Common file does not exist")

    checkpointing._load_base_checkpoint = refuse


def only_weights_are_read(payload: str, results: str) -> None:
    """Read a pickle with ``weights_only=False``, as some versions of Megatron-Core do, while a checkpoint is loaded."""
    import torch

    from wan_train.checkpoint import hooks

    with hooks._only_weights():
        try:
            torch.load(payload, weights_only=False)
        except Exception as error:
            Path(results).write_text(type(error).__name__)


def sets_no_settings() -> None:
    """The optimizer loads the groups of parameters as they were saved."""
    import wan_train.engine.upstream.checkpoints as checkpoints

    checkpoints._set_in_state = lambda *args: None
