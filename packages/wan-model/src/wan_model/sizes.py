"""Bounds of the numbers in configuration files, which decide how much is allocated. Imports no torch."""

from collections.abc import Mapping
from typing import Any

# Far above any model: what is beyond is a mistake or an attack, and would be allocated before the weights are compared.
Bounds = Mapping[str, tuple[int, int]]
TRANSFORMER: Bounds = {
    "num_heads": (1, 1024),
    "head_dim": (6, 4096),
    "num_layers": (1, 1024),
    "ffn_dim": (1, 1 << 20),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "text_dim": (1, 1 << 17),
    "text_length": (1, 1 << 17),
    "freq_dim": (2, 1 << 17),
}
TEXT_ENCODER: Bounds = {
    "vocab_size": (1, 1 << 22),
    "d_model": (1, 1 << 17),
    "d_kv": (1, 1 << 14),
    "d_ff": (1, 1 << 20),
    "num_heads": (1, 1024),
    "num_layers": (1, 1024),
    "relative_attention_num_buckets": (2, 1 << 16),
    "relative_attention_max_distance": (2, 1 << 20),
}
AUTOENCODER: Bounds = {"base_dim": (1, 1 << 14), "z_dim": (1, 4096), "num_res_blocks": (0, 64)}
_MULTIPLES = (1, 64)
_MOST_LEVELS = 8


def check_whole(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number within bounds.

    Raises:
        ValueError: it is none; the message begins with ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        # An integer of thousands of digits cannot be printed.
        shown = "beyond 10^18" if isinstance(value, int) and abs(value) > 10**18 else f"{value!r:.60}"
        raise ValueError(f"{name} is {shown}; expected a whole number from {least} to {most:,}")
    return value


def check_sizes(config: Mapping[str, Any], bounds: Bounds, where: str) -> None:
    """Check that a configuration has all sizes, within their bounds.

    Raises:
        ValueError: the first that is missing or beyond; the message begins with ``where``.
    """
    for name, (least, most) in bounds.items():
        if name not in config:
            raise ValueError(f"{where} lacks {name}")
        check_whole(f"{where}: {name}", config[name], least, most)


def check_autoencoder(config: Mapping[str, Any], where: str) -> None:
    """Check the sizes of diffusers' ``vae/config.json``.

    Raises:
        ValueError: see ``check_sizes``.
    """
    check_sizes(config, AUTOENCODER, where)
    if config.get("decoder_base_dim") is not None:
        check_whole(f"{where}: decoder_base_dim", config["decoder_base_dim"], *AUTOENCODER["base_dim"])
    multiples, in_time = config.get("dim_mult"), config.get("temperal_downsample")
    if not isinstance(multiples, list) or not 1 <= len(multiples) <= _MOST_LEVELS:
        raise ValueError(f"{where}: dim_mult is {multiples!r:.60}; expected a list of at most {_MOST_LEVELS} numbers")
    for multiple in multiples:
        check_whole(f"{where}: dim_mult", multiple, *_MULTIPLES)
    right = isinstance(in_time, list) and all(isinstance(one, bool) for one in in_time)
    if not right or len(in_time or []) != len(multiples) - 1:
        raise ValueError(
            f"{where}: temperal_downsample is {in_time!r:.60}; expected {len(multiples) - 1} of true or false"
        )
