"""The names of Megatron-Bridge's training loop that this package imports.

Import only after ``wan_train.engine.start``.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.models.transformer_config import TransformerConfig
from megatron.bridge.training import pretrain as _pretrain
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.train import force_param_sync, should_disable_forward_pre_hook

__all__ = [
    "Callback",
    "CallbackContext",
    "DatasetBuildContext",
    "DatasetProvider",
    "GlobalState",
    "ModelProviderMixin",
    "TransformerConfig",
    "force_param_sync",
    "get_mixed_precision_config",
    "run_loop",
    "should_disable_forward_pre_hook",
]


def run_loop(config: Any, step: Any, callbacks: list[Callback]) -> None:
    """Megatron-Bridge's ``pretrain``; returns in whichever way it ends a run in order."""
    # From 0.6 on it logs every exception with its traceback, and raises it; who calls this reports it.
    with _without_tracebacks(logging.getLogger(_pretrain.__name__)):
        try:
            _pretrain.pretrain(config, step, callbacks=callbacks)
        except SystemExit as stop:  # the loop exits this way at train.exit_interval
            if stop.code:
                raise


@contextlib.contextmanager
def _without_tracebacks(logger: logging.Logger) -> Iterator[None]:
    def has_none(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    logger.addFilter(has_none)
    try:
        yield
    finally:
        logger.removeFilter(has_none)
