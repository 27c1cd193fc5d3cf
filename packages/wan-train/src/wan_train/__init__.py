"""Parallel training of Wan 2.1 text-to-video models on Megatron-Core and Megatron-Bridge.

Importing this package changes nothing: the engine is started explicitly, see ``wan_train.engine``.
"""

__version__ = "0.1.0"
