"""``WanConfig`` to and from diffusers' ``config.json``, and the models it refuses."""

import dataclasses
import math
from typing import Any

import pytest

from wan_model import WAN_1_3B, WAN_14B, WanConfig

# What the released Wan-AI/Wan2.1-T2V-1.3B-Diffusers says.
RELEASED: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def test_released_sizes() -> None:
    assert WanConfig.from_diffusers(RELEASED) == WAN_1_3B
    wide = {**RELEASED, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
    assert WanConfig.from_diffusers(wide) == WAN_14B
    assert (WAN_1_3B.hidden_size, WAN_14B.hidden_size) == (1536, 5120)
    assert (WAN_1_3B.patch_volume, WAN_1_3B.token_in, WAN_1_3B.token_out) == (4, 64, 64)
    assert WAN_1_3B.token_in == 16 * math.prod(WAN_1_3B.patch_size)


def test_round_trip(small_config: WanConfig) -> None:
    for config in (WAN_1_3B, WAN_14B, small_config):
        back = WanConfig.from_diffusers(config.to_diffusers())
        assert back.to_diffusers() == config.to_diffusers()
    assert {key: RELEASED[key] for key in RELEASED if key != "_diffusers_version"} == {
        key: value for key, value in WAN_1_3B.to_diffusers().items() if key in RELEASED
    }


def test_the_text_length_is_recorded_where_it_is_not_the_official_one() -> None:
    assert WanConfig.from_diffusers(RELEASED).text_length == 512
    assert WanConfig.from_diffusers(RELEASED | {"text_len": None}).text_length == 512
    assert "text_len" not in WAN_1_3B.to_diffusers()
    short = dataclasses.replace(WAN_1_3B, text_length=16)
    assert short.to_diffusers() == {**WAN_1_3B.to_diffusers(), "text_len": 16}
    assert WanConfig.from_diffusers(short.to_diffusers()) == short
    for wrong in (0, "16", True):
        with pytest.raises(ValueError, match=rf"^text_len is {wrong!r}; expected a whole number from 1 to"):
            WanConfig.from_diffusers(RELEASED | {"text_len": wrong})


def test_diffusers_builds_from_ours(small_config: WanConfig, diffusers_model: Any) -> None:
    theirs = WanConfig.from_diffusers(dict(diffusers_model.config) | {"_class_name": "WanTransformer3DModel"})
    assert theirs.to_diffusers() == small_config.to_diffusers()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel; expected a WanTransformer3DModel"),
        ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, "image-to-video and Wan 2.2"),
        ({"in_channels": 36}, "in_channels is 36 and out_channels is 16 .* image-to-video"),
        ({"in_channels": 48, "out_channels": 48}, "in_channels is 48 .* Wan 2.2"),
        ({"qk_norm": None}, "qk_norm is None where Wan 2.1"),
        ({"cross_attn_norm": False}, "cross_attn_norm is False"),
    ],
    ids=["vace", "image-to-video 2.1", "image-to-video 2.2", "2.2 5B", "qk_norm", "cross_attn_norm"],
)
def test_other_models_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig.from_diffusers(RELEASED | change)


def test_missing_sizes_are_named() -> None:
    short = {key: value for key, value in RELEASED.items() if key not in ("ffn_dim", "eps")}
    with pytest.raises(ValueError, match="lacks ffn_dim, eps"):
        WanConfig.from_diffusers(short)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_dim": 4}, "head_dim is 4"),
        ({"head_dim": 25}, "head_dim is 25"),
        ({"freq_dim": 3}, "freq_dim is 3"),
        ({"patch_size": (1, 0, 2)}, r"a side of patch_size \(1, 0, 2\) is 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig(**sizes)
