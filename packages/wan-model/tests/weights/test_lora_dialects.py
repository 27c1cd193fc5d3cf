"""LoRA files of every dialect: diffusers' converters and peft say what the merged weights are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_model.dit.lora import LoraSettings
from wan_model.dit.model import WanDiT
from wan_model.testing.lora_files import (
    Drawn,
    Tensors,
    base_weights,
    comfy,
    diffusers_transformer,
    fused_by_diffusers,
    kohya,
    lightx2v,
    train_with_peft,
)
from wan_model.testing.lora_reference import assert_same_weights, changed_by, drawn_adapters
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.lora_file import FORMATS, LoraOrigin, save_lora
from wan_model.weights.lora_names import METADATA_KEY
from wan_model.weights.lora_reading import PEFT_WEIGHTS_NAME, WEIGHTS_NAME, merge_loras, read_lora

pytestmark = [
    # peft about the second adapter of a model, and about the biases that it saves itself.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 22 LoRA tensor.s. have invalid shape:Warning"),
]
DIALECTS: dict[str, Callable[[], Tensors]] = {
    "diffusion_model. with lora_A and lora_B": lambda: comfy(ab=True, alpha=None),
    "diffusion_model. with ranks of several sizes": lambda: comfy(ab=True, alpha=None, ranks=(2, 4, 4)),
    "diffusion_model. with lora_down, lora_up and a small alpha": lambda: comfy(ab=False, alpha=0.25),
    "diffusion_model. with lora_A, lora_B and alpha": lambda: comfy(ab=True, alpha=6.0, ranks=(3, 4)),
    "kohya": kohya,
    "kohya with a large alpha": lambda: kohya(alpha=16.0),
    "lightx2v": lightx2v,
    "lightx2v with an alpha": lambda: lightx2v(alpha=6.0),
}
WEIGHTS = base_weights()


def merged(*paths: Path, scales: tuple[float, ...] = (1.0,)) -> Tensors:
    model = WanDiT(TINY_CONFIG)
    model.load_state_dict(WEIGHTS)
    merge_loras([read_lora(path, TINY_CONFIG, scale) for path, scale in zip(paths, scales, strict=True)], model)
    return model.state_dict()


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert any(not torch.equal(ours[key], WEIGHTS[key]) for key in ours)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_equal_the_converters_of_diffusers(tmp_path: Path, dialect: str) -> None:
    from diffusers import WanPipeline

    path = tmp_path / "style.safetensors"
    save_file(DIALECTS[dialect](), path)
    converted = WanPipeline.lora_state_dict(tmp_path, weight_name=path.name)
    wanted = dict(WEIGHTS)
    for key, down in converted.items():
        name = key.removeprefix("transformer.").rsplit(".lora_", 1)[0]
        if key.endswith("lora_A.weight"):
            wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + converted[f"transformer.{name}.lora_B.weight"] @ down
        elif key.endswith("lora_B.bias"):
            wanted[f"{name}.bias"] = wanted[f"{name}.bias"] + down
    assert_equal(merged(path), wanted)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_equal_what_diffusers_fuses(tmp_path: Path, dialect: str) -> None:
    pytest.importorskip("peft")
    path = tmp_path / "style.safetensors"
    save_file(DIALECTS[dialect](), path)
    assert_equal(merged(path, scales=(0.7,)), fused_by_diffusers(WEIGHTS, [path], [0.7]))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [("*",), ("attn1.to_out.0", "blocks.1.ffn.*")])
@pytest.mark.parametrize("format", FORMATS)
def test_files_that_wan_model_writes(tmp_path: Path, format: str, targets: tuple[str, ...], use_rslora: bool) -> None:
    settings = LoraSettings(4, 12.0, use_rslora=use_rslora, targets=targets)
    adapters = drawn_adapters(TINY_CONFIG, settings)
    origin = LoraOrigin(base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", base_digest="0f3a", run="rabbits", step=40)
    save_lora(adapters, settings, TINY_CONFIG, tmp_path / "style.safetensors", format=format, origin=origin)
    factor = 6.0 if use_rslora else 3.0
    assert_same_weights(merged(tmp_path / "style.safetensors"), changed_by(WEIGHTS, adapters, factor))


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "names with an alpha and a rank of their own": {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {"to_k": 1, "blocks.1.attn2.to_q": 3},
        "rank_pattern": {"attn1.to_v": 2, "ffn.net.2": 5},
    },
    "regular expressions": {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {r"blocks\.0\..*to_(q|k)": 1, "^blocks.1.attn[12].to_v": 2, "blocks.*": 9, "to_q": 100},
        "rank_pattern": {r".*attn2.*": 2, "net.(0.proj|7)": 3},
    },
    "rsLoRA with patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {"to_k": 1},
        "rank_pattern": {"to_k": 2},
    },
    "biases and the patch embedding": {"r": 4, "lora_alpha": 6, "lora_bias": True, "also": ["patch_embedding"]},
}


def lora_config(name: str) -> Any:
    from peft import LoraConfig

    given = dict(CONFIGURATIONS[name])
    targets = [*ATTENTION, "net.0.proj", "net.2", "time_proj", *given.pop("also", [])]
    return LoraConfig(target_modules=targets, init_lora_weights=False, **given)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_in_the_metadata(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import WanPipeline
    from diffusers.training_utils import _collate_lora_metadata

    model = train_with_peft(WEIGHTS, lambda model: model.add_adapter(lora_config(name)) or model)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    assert_equal(merged(tmp_path), fused_by_diffusers(WEIGHTS, [tmp_path / WEIGHTS_NAME]))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_adapters_of_peft_with_their_configuration_beside(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    model = train_with_peft(WEIGHTS, lambda model: peft.get_peft_model(model, lora_config(name)))
    model.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / PEFT_WEIGHTS_NAME))
    loaded = peft.PeftModel.from_pretrained(diffusers_transformer(WEIGHTS), tmp_path)
    theirs = loaded.merge_and_unload().state_dict()
    assert_equal(merged(tmp_path), theirs)
    # Under another name too, as the prefix says whose it is.
    renamed = (tmp_path / PEFT_WEIGHTS_NAME).rename(tmp_path / "style.safetensors")
    assert_equal(merged(renamed), theirs)


def test_an_adapter_that_the_transformer_saved_itself(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = train_with_peft(WEIGHTS, lambda model: model.add_adapter(lora_config("rsLoRA")) or model)
    model.save_lora_adapter(tmp_path)
    theirs = diffusers_transformer(WEIGHTS)
    theirs.load_lora_adapter(tmp_path, weight_name=WEIGHTS_NAME, prefix=None)
    theirs.fuse_lora()
    theirs.unload_lora()
    assert_equal(merged(tmp_path), theirs.state_dict())


def test_a_configuration_for_names_of_diffusers_in_a_file_with_official_names(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config: dict[str, Any] = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 2, "ffn.net.(0.proj|7)": 3}}
    config["target_modules"] = [*ATTENTION, "net.0.proj", "net.2", "linear_1", "linear_2", "time_proj"]
    metadata = {METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(comfy(ab=True, alpha=None), tmp_path / WEIGHTS_NAME, metadata)
    assert_equal(merged(tmp_path), fused_by_diffusers(WEIGHTS, [tmp_path / WEIGHTS_NAME]))


def test_several_files_with_their_scales(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    for path, tensors in zip(paths, (kohya(), lightx2v(), comfy(ab=True, alpha=None)), strict=True):
        save_file(tensors, path)
    scales = (0.7, -0.3, 1.0)
    assert_equal(merged(*paths, scales=scales), fused_by_diffusers(WEIGHTS, paths, scales))


def test_what_diffusers_leaves_out_is_added(tmp_path: Path) -> None:
    shapes = {key: value.shape for key, value in WEIGHTS.items()}
    # By the formula of ComfyUI and lightx2v: the difference times the scale.
    places = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "head.head.diff": "proj_out.weight",
    }
    draw = Drawn(6)
    changes = {key: draw(*shapes[place]) for key, place in places.items()}
    save_file({f"diffusion_model.{key}": value for key, value in changes.items()}, tmp_path / "a.safetensors")
    wanted = dict(WEIGHTS)
    for key, place in places.items():
        wanted[place] = wanted[place] + 0.5 * changes[key]
    assert_equal(merged(tmp_path, scales=(0.5,)), wanted)


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key.replace("diffusion_model.", ""),
        lambda key: key.replace("diffusion_model.", "transformer."),
        lambda key: key.replace("diffusion_model.", "base_model.model.diffusion_model."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    ],
)
def test_other_spellings_of_one_file(tmp_path: Path, spell: Callable[[str], str]) -> None:
    tensors = comfy(ab=True, alpha=3.0)
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({spell(key): value for key, value in tensors.items()}, tmp_path / "b.safetensors")
    assert_equal(merged(tmp_path / "b.safetensors"), merged(tmp_path / "a.safetensors"))
