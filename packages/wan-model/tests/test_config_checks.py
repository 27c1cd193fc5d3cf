"""Wrong numbers in configuration files: one sentence that names them, before anything is allocated or awaited."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_model import WAN_1_3B, WanConfig
from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.text_encoder import TextEncoder
from wan_model.codec.vae_decoder import VaeDecoder
from wan_model.config_checks import check_whole
from wan_model.tiny import write_tiny_wan
from wan_model.weights.model_folder import latent_spec_of
from wan_model.weights.transformer import load_transformer

HUGE, LONG, ABSENT = 10**9, 10**5000, "ABSENT"
Case = tuple[str, str, Any, str]
# Which part, which key, its value, and what is said.
CASES: list[Case] = [
    ("transformer", "num_layers", HUGE, "num_layers is 1000000000; expected a whole number from 1 to 1,024"),
    ("transformer", "num_layers", 2.5, "num_layers is 2.5; expected a whole number"),
    ("transformer", "num_layers", "2", "num_layers is '2'; expected a whole number"),
    ("transformer", "num_layers", True, "num_layers is True; expected a whole number"),
    ("transformer", "num_layers", None, "num_layers is None; expected a whole number"),
    ("transformer", "num_layers", LONG, "num_layers is beyond 10"),
    ("transformer", "num_layers", 1000, "are not this model's"),
    ("transformer", "num_attention_heads", HUGE, "num_attention_heads is 1000000000"),
    ("transformer", "attention_head_dim", HUGE, "attention_head_dim is 1000000000"),
    ("transformer", "ffn_dim", HUGE, "ffn_dim is 1000000000"),
    ("transformer", "ffn_dim", 1 << 20, "are not this model's"),
    ("transformer", "in_channels", [16], "in_channels is .* and out_channels is"),
    ("transformer", "text_dim", -1, "text_dim is -1"),
    ("transformer", "freq_dim", HUGE, "freq_dim is 1000000000"),
    ("transformer", "patch_size", [1, HUGE, 2], "patch_size .* is 1000000000"),
    ("transformer", "patch_size", 2, "patch_size is 2; expected three whole numbers"),
    ("transformer", "patch_size", [1, 2.0, 2], "patch_size .* is 2.0; expected a whole number"),
    ("transformer", "eps", "small", "eps is 'small'; expected a number between 0 and 1"),
    ("transformer", "eps", float("nan"), "eps is nan; expected a number between 0 and 1"),
    ("transformer", "rope_max_seq_len", "many", "rope_max_seq_len is 'many'; expected a whole number"),
    ("text_encoder", "vocab_size", HUGE, "vocab_size is 1000000000"),
    ("text_encoder", "vocab_size", 1 << 22, "of shape .*; expected"),
    ("text_encoder", "d_model", 3.5, "d_model is 3.5"),
    ("text_encoder", "num_layers", HUGE, "num_layers is 1000000000"),
    ("text_encoder", "num_heads", "8", "num_heads is '8'"),
    ("text_encoder", "relative_attention_max_distance", 8, "relative_attention_max_distance is 8; .* from 9 to"),
    ("text_encoder", "layer_norm_epsilon", "small", "layer_norm_epsilon is 'small'; expected a number between 0 and 1"),
    ("text_encoder", "model_type", ["umt5"], r"the text encoder is \['umt5'\] with gated-gelu"),
    ("text_encoder", "relative_attention_num_buckets", HUGE, "relative_attention_num_buckets is 1000000000"),
    ("vae", "base_dim", HUGE, "base_dim is 1000000000"),
    ("vae", "z_dim", 0, "z_dim is 0"),
    ("vae", "num_res_blocks", HUGE, "num_res_blocks is 1000000000"),
    ("vae", "dim_mult", [1] * 1000, "dim_mult is .* expected a list of at most 8 numbers"),
    ("vae", "dim_mult", [1, HUGE], "dim_mult is 1000000000"),
    ("vae", "dim_mult", 4, "dim_mult is 4; expected a list"),
    ("vae", "temperal_downsample", [True], "temperal_downsample is .*; expected 3 of true or false"),
    ("vae", "decoder_base_dim", HUGE, "decoder_base_dim is 1000000000"),
    ("vae", "attn_scales", 0.5, "attn_scales is 0.5; expected none"),
]
# Of what `latent_spec_of` reads.
SPACES: list[Case] = [
    ("vae", "z_dim", ABSENT, " lacks z_dim"),
    ("vae", "latents_std", ABSENT, ": latents_std is None; expected 16 positive numbers"),
    ("vae", "latents_std", ["1"] * 16, ": latents_std has '1' in it; expected 16 positive numbers"),
    ("vae", "latents_std", [1] * 15, ": latents_std has 15 values; expected 16 positive numbers"),
    ("vae", "latents_std", [1] * 15 + [0], ": latents_std has 0 in it; expected 16 positive numbers"),
    ("vae", "latents_mean", ["0"] * 16, ": latents_mean has '0' in it; expected 16 finite numbers"),
    ("vae", "latents_mean", [float("nan")] * 16, ": latents_mean has nan in it; expected 16 finite numbers"),
    ("vae", "temperal_downsample", [True] * 1000, ": temperal_downsample is .*; expected 3 of true or false"),
    ("vae", "_class_name", ["AutoencoderKLWan"], r" is of a \['AutoencoderKLWan'\]; expected an AutoencoderKLWan"),
    ("text_encoder", "d_model", ABSENT, " lacks d_model"),
    ("text_encoder", "d_model", "32", ": d_model is '32'; expected a whole number"),
    ("text_encoder", "num_layers", 0, ": num_layers is 0"),
]
LOADERS: dict[str, Callable[[Path], Any]] = {
    "transformer": lambda folder: load_transformer(folder / "transformer"),
    "text_encoder": lambda folder: TextEncoder.from_pretrained(folder / "text_encoder"),
    "vae": lambda folder: VaeDecoder.from_pretrained(folder / "vae"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_wan(folder, seed=1)
    return folder


@pytest.fixture
def changed(folder: Path) -> Iterator[Callable[[str, str, Any], None]]:
    """Changes a value of a configuration for one test."""
    before: dict[Path, str] = {}

    def change(part: str, key: str, value: Any) -> None:
        path = folder / part / "config.json"
        before[path] = path.read_text()
        content = json.loads(before[path]) | {key: "PLACE"}
        if value == ABSENT:
            del content[key]
            value = None
        # json.dumps cannot write thousands of digits.
        text = "1" + "0" * 5000 if value == LONG else json.dumps(value)
        path.write_text(json.dumps(content).replace('"PLACE"', text))

    yield change
    for path, content in before.items():
        path.write_text(content)


@pytest.mark.parametrize(
    ("part", "key", "value", "said"), CASES, ids=lambda value: f"{value!r:.20}" if value != LONG else ""
)
def test_a_number_that_lies_is_named_at_once(
    part: str, key: str, value: Any, said: str, folder: Path, changed: Callable[[str, str, Any], None]
) -> None:
    changed(part, key, value)
    start = time.process_time()
    with pytest.raises(ValueError, match=said if value != LONG else "can be read|beyond") as error:
        LOADERS[part](folder)
    assert time.process_time() - start < 20
    assert str(folder / part) in str(error.value)


@pytest.mark.parametrize(("part", "key", "value", "said"), SPACES, ids=lambda value: f"{value!r:.20}")
def test_what_no_latent_space_has_is_named(
    part: str, key: str, value: Any, said: str, folder: Path, changed: Callable[[str, str, Any], None]
) -> None:
    changed(part, key, value)
    with pytest.raises(ValueError, match=f"^{folder}/{part}/config.json{said}"):
        latent_spec_of(folder)


def test_diffusers_is_not_asked_to_build_what_lies(folder: Path, changed: Callable[[str, str, Any], None]) -> None:
    changed("vae", "base_dim", HUGE)
    with pytest.raises(ValueError, match=r"config\.json: base_dim is 1000000000"):
        LatentCodec.from_pretrained(folder, load_text=False)


def test_right_folders_are_loaded(folder: Path) -> None:
    for load in LOADERS.values():
        assert all(bool(torch.isfinite(value).all()) for value in load(folder).state_dict().values())


def test_a_rotary_table_of_another_length_is_the_same_model() -> None:
    assert WanConfig.from_diffusers(WAN_1_3B.to_diffusers() | {"rope_max_seq_len": 2048}) == WAN_1_3B


def test_the_bounds_themselves_are_allowed() -> None:
    assert [check_whole("x", value, 1, 4) for value in (1, 4)] == [1, 4]
    for value in (0, 5):
        with pytest.raises(ValueError, match=f"x is {value}; expected a whole number from 1 to 4"):
            check_whole("x", value, 1, 4)
