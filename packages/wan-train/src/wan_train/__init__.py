"""Parallel training of Wan 2.1 text-to-video models on Megatron-Core and Megatron-Bridge.

Importing this package has no side effects and imports no torch: the engine is started explicitly
(``wan_train.engine``), and the module of each name below is imported on first use.
"""

from typing import TYPE_CHECKING

from wan_model.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_train.checkpoint.export import export
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import pretrain

__all__ = ["RunOptions", "export", "pretrain"]
__version__ = "0.1.0"

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, {"RunOptions": "config.options", "export": "checkpoint.export", "pretrain": "loop.run"}
    )
