"""What configuration files may hold, above all the bounds of numbers, which decide how much is allocated.

Every refusal is a ``ValueError`` that begins with the place of the value. Imports no torch.
"""

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
    "relative_attention_num_buckets": (4, 1 << 16),
    "relative_attention_max_distance": (2, 1 << 20),
}
AUTOENCODER: Bounds = {"base_dim": (1, 1 << 14), "z_dim": (1, 4096), "num_res_blocks": (0, 64)}
_MULTIPLES = (1, 64)
_MOST_LEVELS = 8
_LARGEST_NUMBER = 1e30
# Of transformers' UMT5Config, for what a configuration leaves out.
_TEXT_ENCODER_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


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


def check_fraction(name: str, value: object) -> float:
    """Return a number between 0 and 1, such as the epsilon of a norm.

    Raises:
        ValueError: it is none; the message begins with ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r:.60}; expected a number between 0 and 1")
    return value


def check_numbers(name: str, values: object, count: int, *, positive: bool = False) -> tuple[float, ...]:
    """Return a list of finite numbers as a tuple.

    Args:
        name: of the list, in messages.
        values: the list.
        count: of its numbers.
        positive: whether each must be above 0.

    Raises:
        ValueError: it is none; the message begins with ``name``.
    """
    expected = f"expected {count} {'positive' if positive else 'finite'} numbers"
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} is {values!r:.60}; {expected}")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values; {expected}")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER
        if not number or (positive and value <= 0):
            raise ValueError(f"{name} has {value!r:.60} in it; {expected}")
    return tuple(values)


def check_text_encoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check transformers' ``text_encoder/config.json``.

    Returns:
        The configuration, with UMT5's value where it leaves one out.

    Raises:
        ValueError: it is not of UMT5 with gated tanh-GELU, or see ``check_sizes``.
    """
    kind, activation = config.get("model_type"), config.get("feed_forward_proj")
    if (kind, activation) != ("umt5", "gated-gelu"):
        raise ValueError(
            f"{where}: the text encoder is {kind!s:.60} with {activation!s:.60}; expected umt5 with gated-gelu"
        )
    complete = {**_TEXT_ENCODER_DEFAULTS, **config}
    check_sizes(complete, TEXT_ENCODER, where)
    check_fraction(f"{where}: layer_norm_epsilon", complete["layer_norm_epsilon"])
    # A quarter of the buckets is for one distance each; the next ones grow up to the largest distance.
    near = complete["relative_attention_num_buckets"] // 4
    check_whole(
        f"{where}: relative_attention_max_distance",
        complete["relative_attention_max_distance"],
        near + 1,
        TEXT_ENCODER["relative_attention_max_distance"][1],
    )
    return complete


def check_autoencoder(config: Mapping[str, Any], where: str) -> None:
    """Check diffusers' ``vae/config.json``.

    Raises:
        ValueError: it is of another autoencoder than Wan 2.1's, or see ``check_sizes``.
    """
    kind = config.get("_class_name", "AutoencoderKLWan")
    if kind != "AutoencoderKLWan":
        raise ValueError(f"{where} is of a {kind!s:.60}; expected an AutoencoderKLWan")
    if config.get("is_residual") or config.get("patch_size"):
        raise ValueError(f"{where} is of the autoencoder of Wan 2.2 (16 x 16 pixels a latent); expected Wan 2.1's")
    if config.get("attn_scales"):
        raise ValueError(f"{where}: attn_scales is {config['attn_scales']!r:.60}; expected none, as in Wan 2.1")
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
