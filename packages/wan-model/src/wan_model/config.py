"""The sizes that define one Wan 2.1 transformer, to and from diffusers' ``transformer/config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from wan_model.config_checks import TRANSFORMER, check_fraction, check_whole

PatchSize = tuple[int, int, int]

# Our names and diffusers' names. All other fields of its config.json have fixed values in Wan 2.1 text-to-video.
_DIFFUSERS_NAMES = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
    "patch_size": "patch_size",
}
_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
}
# The official configuration's name of ``text_length``. diffusers has none: there it is an argument of every call of the
# pipeline (``max_sequence_length``), so a file without it is of a model of the official length.
TEXT_LENGTH_KEY = "text_len"
OFFICIAL_TEXT_LENGTH = 512
# A bound of the positions that diffusers computes beforehand; here they are computed for every pack.
_ROPE_POSITIONS = {"rope_max_seq_len": 1024}


def _check(values: Mapping[str, Any]) -> None:
    """Refuse sizes that the architecture cannot have, of whatever type; see ``WanConfig``."""
    for name, (least, most) in TRANSFORMER.items():
        if name in values:
            check_whole(name, values[name], least, most)
    if values["head_dim"] % 2:
        raise ValueError(
            f"head_dim is {values['head_dim']}; rotary embedding over three axes needs an even number of 6 or more"
        )
    if values["freq_dim"] % 2:
        raise ValueError(f"freq_dim is {values['freq_dim']}; sines and cosines need an even number")
    patch = values["patch_size"]
    if not isinstance(patch, list | tuple) or len(patch) != 3:
        raise ValueError(f"patch_size is {patch!r:.60}; expected three whole numbers (frames, rows, columns)")
    for side in patch:
        check_whole(f"a side of patch_size {patch!r:.60}", side, 1, 64)
    check_fraction("eps", values["eps"])


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan 2.1 transformer; the defaults are those of the 1.3B text-to-video model.

    ``text_length`` is the number of tokens that every text is zero-padded to. The padding takes part in
    cross-attention, so it is a property of the weights although no tensor has this size.

    Source: the released ``config.json`` files and diffusers' ``WanTransformer3DModel``.

    Raises:
        ValueError: a size that the architecture cannot have.
    """

    num_heads: int = 12
    head_dim: int = 128
    num_layers: int = 30
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = OFFICIAL_TEXT_LENGTH
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: PatchSize = (1, 2, 2)

    def __post_init__(self) -> None:
        _check(dataclasses.asdict(self))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns

    @property
    def token_in(self) -> int:
        """Values of one input token (64 in the released models)."""
        return self.in_channels * self.patch_volume

    @property
    def token_out(self) -> int:
        """Values of one predicted token."""
        return self.out_channels * self.patch_volume

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "WanConfig":
        """Read diffusers' ``transformer/config.json``, and in it the official ``text_len`` (512 if absent or null).

        Raises:
            ValueError: the file describes another model (image-to-video, Wan 2.2, another class), naming the field.
        """
        name = config.get("_class_name", "WanTransformer3DModel")
        if name != "WanTransformer3DModel":
            raise ValueError(
                f"the configuration is of a {name!s:.60}; expected a WanTransformer3DModel (Wan 2.1 text-to-video)"
            )
        for key, wanted in _FIXED.items():
            got = config.get(key, wanted)
            if got != wanted:
                raise ValueError(
                    f"{key} is {got!r:.60} where Wan 2.1 text-to-video has {wanted!r}: "
                    "image-to-video and Wan 2.2 models are not supported"
                )
        if config.get("in_channels") == 48:
            raise ValueError("in_channels is 48 where Wan 2.1 text-to-video has 16: Wan 2.2 models are not supported")
        if config.get("out_channels") and config.get("in_channels") != config["out_channels"]:
            raise ValueError(
                f"in_channels is {config.get('in_channels')!r:.60} and out_channels is {config['out_channels']!r:.60} "
                "where Wan 2.1 text-to-video has them equal: image-to-video models are not supported"
            )
        for key, otherwise in _ROPE_POSITIONS.items():
            check_whole(key, config.get(key, otherwise), 1, 1 << 30)
        values = {ours: config[theirs] for theirs, ours in _DIFFUSERS_NAMES.items() if theirs in config}
        if missing := [theirs for theirs, ours in _DIFFUSERS_NAMES.items() if ours not in values]:
            raise ValueError(f"the transformer's configuration lacks {', '.join(missing)}")
        values["out_channels"] = values["out_channels"] or values["in_channels"]
        if config.get(TEXT_LENGTH_KEY) is not None:
            values["text_length"] = check_whole(TEXT_LENGTH_KEY, config[TEXT_LENGTH_KEY], *TRANSFORMER["text_length"])
        for theirs, ours in _DIFFUSERS_NAMES.items():
            if ours in TRANSFORMER:
                check_whole(theirs, values[ours], *TRANSFORMER[ours])
        _check(values)
        values["patch_size"] = tuple(values["patch_size"])
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' ``transformer/config.json`` for this model.

        It has ``text_len`` only where that is not the official one: diffusers ignores the field with a warning.
        """
        ours = {theirs: getattr(self, name) for theirs, name in _DIFFUSERS_NAMES.items()}
        return {
            "_class_name": "WanTransformer3DModel",
            **ours,
            "patch_size": list(self.patch_size),
            **_FIXED,
            **_ROPE_POSITIONS,
            **({} if self.text_length == OFFICIAL_TEXT_LENGTH else {TEXT_LENGTH_KEY: self.text_length}),
        }


WAN_1_3B = WanConfig()
WAN_14B = WanConfig(num_heads=40, num_layers=40, ffn_dim=13824)
