"""The names of Megatron-Bridge's training loop that this package imports.

Import only after ``wan_train.engine.start``.
"""

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
    """Megatron-Bridge's ``pretrain``."""
    _pretrain.pretrain(config, step, callbacks=callbacks)
