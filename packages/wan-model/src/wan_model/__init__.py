"""Wan 2.1 text-to-video: the transformer, the flow-matching objective, the latent codec.

Importing this package imports no torch; the module of each name below is imported on first use.
"""

import warnings
from typing import TYPE_CHECKING

from wan_model.system.lazy import lazy_names

# torch warns on its import about a package that others install (nvidia-resiliency-ext) and nobody here uses. All four
# packages and their child processes import this one first, so the warning heads the output of no command.
warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)

if TYPE_CHECKING:
    from wan_model.config import WAN_1_3B, WAN_14B, WanConfig
    from wan_model.dit.context_parallel import ContextParallel
    from wan_model.dit.flops import pack_flops
    from wan_model.dit.model import Stage, WanDiT
    from wan_model.dit.ops import Ops, TorchOps
    from wan_model.latent_spec import LatentSpec
    from wan_model.pack import LatentPack, PackLayout, TokenRows, pack_latents, pad_text, patchify, unpatchify
    from wan_model.weights.transformer import init_weights, load_transformer, save_transformer

__all__ = [
    "WAN_1_3B",
    "WAN_14B",
    "ContextParallel",
    "LatentPack",
    "LatentSpec",
    "Ops",
    "PackLayout",
    "Stage",
    "TokenRows",
    "TorchOps",
    "WanConfig",
    "WanDiT",
    "init_weights",
    "load_transformer",
    "pack_flops",
    "pack_latents",
    "pad_text",
    "patchify",
    "save_transformer",
    "unpatchify",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(("WAN_1_3B", "WAN_14B", "WanConfig"), "config"),
            "ContextParallel": "dit.context_parallel",
            "pack_flops": "dit.flops",
            **dict.fromkeys(("Stage", "WanDiT"), "dit.model"),
            **dict.fromkeys(("Ops", "TorchOps"), "dit.ops"),
            "LatentSpec": "latent_spec",
            **dict.fromkeys(
                ("LatentPack", "PackLayout", "TokenRows", "pack_latents", "pad_text", "patchify", "unpatchify"), "pack"
            ),
            **dict.fromkeys(("init_weights", "load_transformer", "save_transformer"), "weights.transformer"),
        },
    )
