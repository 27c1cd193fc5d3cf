"""LoRA files: what diffusers and the formulas of ComfyUI and kohya make of them, their metadata, and refusals."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wan_model import WanConfig
from wan_model.dit.lora import LoraSettings, adapter_shapes
from wan_model.testing.lora_reference import (
    Tensors,
    assert_same_weights,
    changed_by,
    diffusers_transformer,
    drawn_adapters,
    drawn_weights,
    fused_by_diffusers,
)
from wan_model.weights.lora_file import FORMATS, LoraOrigin, save_lora

# Every rule for the factor; of each the factor of B A.
SETTINGS = {
    "alpha": (LoraSettings(4, 12.0), 3.0),
    "rsLoRA": (LoraSettings(4, 12.0, use_rslora=True), 6.0),
    "rsLoRA of an odd rank": (LoraSettings(3, 2.5, use_rslora=True), 2.5 / math.sqrt(3)),
    "no alpha": (LoraSettings(4), 1.0),
}
SOME = LoraSettings(4, 12.0, targets=("attn1.to_out.0", "blocks.1.attn2.to_k", "ffn.net.2"))
# The official release's names, written out from its model.py.
OFFICIAL = {
    "blocks.{}.self_attn.q": "blocks.{}.attn1.to_q.weight",
    "blocks.{}.self_attn.k": "blocks.{}.attn1.to_k.weight",
    "blocks.{}.self_attn.v": "blocks.{}.attn1.to_v.weight",
    "blocks.{}.self_attn.o": "blocks.{}.attn1.to_out.0.weight",
    "blocks.{}.cross_attn.q": "blocks.{}.attn2.to_q.weight",
    "blocks.{}.cross_attn.k": "blocks.{}.attn2.to_k.weight",
    "blocks.{}.cross_attn.v": "blocks.{}.attn2.to_v.weight",
    "blocks.{}.cross_attn.o": "blocks.{}.attn2.to_out.0.weight",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj.weight",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2.weight",
}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def merged_as_in_comfyui(weights: Tensors, path: Path, config: WanConfig, format: str) -> Tensors:
    """Each up @ down times alpha / rank, for every key that ComfyUI's map of the model has; no key is left."""
    stored, merged = load_file(path), dict(weights)
    for layer in range(config.num_layers):
        for official, key in OFFICIAL.items():
            own = official.format(layer)
            own, down, up = {
                "comfyui": (f"diffusion_model.{own}", "lora_A", "lora_B"),
                "kohya": (f"lora_unet_{own.replace('.', '_')}", "lora_down", "lora_up"),
            }[format]
            if f"{own}.alpha" not in stored:
                continue
            a, b = (stored.pop(f"{own}.{part}.weight").double() for part in (down, up))
            alpha = stored.pop(f"{own}.alpha").item()
            merged[key.format(layer)] = weights[key.format(layer)].double() + alpha / a.shape[0] * b @ a
    assert not stored
    return merged


@pytest.fixture(scope="module")
def weights(small_config: WanConfig) -> Tensors:
    return drawn_weights(small_config)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SETTINGS)
def test_diffusers_fuses_the_change(
    tmp_path: Path, small_config: WanConfig, weights: Tensors, format: str, name: str
) -> None:
    settings, factor = SETTINGS[name]
    adapters, path = drawn_adapters(small_config, settings), tmp_path / "style.safetensors"
    save_lora(adapters, settings, small_config, path, format=format)
    fused = fused_by_diffusers(small_config, weights, [path])
    assert_same_weights(fused, changed_by(weights, adapters, factor))


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_diffusers_reads_adapters_of_some_linears(
    tmp_path: Path, small_config: WanConfig, weights: Tensors, format: str
) -> None:
    adapters, path = drawn_adapters(small_config, SOME), tmp_path / "style.safetensors"
    save_lora(adapters, SOME, small_config, path, format=format)
    assert_same_weights(fused_by_diffusers(small_config, weights, [path]), changed_by(weights, adapters, 3.0))


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", [*SETTINGS, "some linears"])
def test_the_formula_of_comfyui_gives_the_change(
    tmp_path: Path, small_config: WanConfig, weights: Tensors, format: str, name: str
) -> None:
    settings, factor = (SETTINGS | {"some linears": (SOME, 3.0)})[name]
    adapters, path = drawn_adapters(small_config, settings), tmp_path / "style.safetensors"
    save_lora(adapters, settings, small_config, path, format=format)
    merged = merged_as_in_comfyui(weights, path, small_config, format)
    assert_same_weights(merged, changed_by(weights, adapters, factor))


def test_a_transformer_of_diffusers_that_loads_the_file_drops_nothing(
    tmp_path: Path, small_config: WanConfig, weights: Tensors
) -> None:
    settings = LoraSettings(4, 12.0, dropout=0.5)
    adapters, path = drawn_adapters(small_config, settings), tmp_path / "style.safetensors"
    save_lora(adapters, settings, small_config, path)
    own = diffusers_transformer(small_config, weights).eval()
    with torch.random.fork_rng(devices=[]):
        own.load_lora_adapter(tmp_path, weight_name=path.name)
    wanted = diffusers_transformer(small_config, {k: v.float() for k, v in changed_by(weights, adapters, 3.0).items()})
    draw = torch.Generator().manual_seed(2)
    video, text = (torch.randn(size, generator=draw) for size in ((1, 16, 2, 4, 6), (1, 16, small_config.text_dim)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second, theirs = (
            model(video, torch.tensor([500]), text, return_dict=False)[0] for model in (own, own, wanted.eval())
        )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, theirs, rtol=1e-3, atol=1e-4)
    assert metadata_of(path)["wan.dropout"] == "0.5"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_of_diffusers_is_that_of_its_pipeline(tmp_path: Path, small_config: WanConfig, name: str) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig

    settings, _ = SETTINGS[name]
    adapters = drawn_adapters(small_config, settings)
    save_lora(adapters, settings, small_config, tmp_path / "ours.safetensors")
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, use_rslora=settings.use_rslora, target_modules=["to_q"])
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=adapters,
        transformer_lora_adapter_metadata=config.to_dict(),
        weight_name="theirs.safetensors",
    )
    ours, theirs = (load_file(tmp_path / f"{file}.safetensors") for file in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    key = "lora_adapter_metadata"
    given, wanted = (json.loads(metadata_of(tmp_path / f"{file}.safetensors")[key]) for file in ("ours", "theirs"))
    targets = given.pop("transformer.target_modules")
    assert targets == [key.removesuffix(".lora_A.weight") for key in adapters if key.endswith(".lora_A.weight")]
    assert given == {field: wanted[field] for field in given}, "every field is one of theirs, with their value"


# -- precision and metadata -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_round_the_matrices_and_not_the_factor(
    tmp_path: Path, small_config: WanConfig, weights: Tensors, format: str, dtype: str
) -> None:
    settings = LoraSettings(3, 2.3, use_rslora=True)  # whose alpha no 16 bits hold
    adapters, path = drawn_adapters(small_config, settings), tmp_path / "style.safetensors"
    save_lora(adapters, settings, small_config, path, format=format, dtype=dtype)
    stored = load_file(path)
    assert {value.dtype for key, value in stored.items() if value.ndim == 2} == {getattr(torch, dtype)}
    if format == "diffusers":
        assert json.loads(metadata_of(path)["lora_adapter_metadata"])["transformer.lora_alpha"] == 2.3
    else:
        rounded = {key: value.to(getattr(torch, dtype)) for key, value in adapters.items()}
        merged = merged_as_in_comfyui(weights, path, small_config, format)
        assert_same_weights(merged, changed_by(weights, rounded, settings.factor))


ORIGIN = LoraOrigin(
    base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", base_digest="0f3a", run="rabbits", step=40, software="wan-train 0.1.0"
)


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_say_what_the_file_is(tmp_path: Path, small_config: WanConfig, format: str) -> None:
    settings = LoraSettings(4, 12.0, use_rslora=True)
    path = tmp_path / "home" / "style.safetensors"
    save_lora(drawn_adapters(small_config, settings), settings, small_config, path, format=format, origin=ORIGIN)
    found = metadata_of(path)
    assert "home" not in json.dumps(found)
    found.pop("lora_adapter_metadata", None)
    kohya = {
        "ss_base_model_version": "wan",
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "4",
        "ss_network_alpha": "24",
        "ss_network_args": "{}",
        "ss_sd_model_name": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "ss_steps": "40",
    }
    assert found == {
        "format": "pt",
        "wan.rank": "4",
        "wan.alpha": "12",
        "wan.use_rslora": "true",
        "wan.dropout": "0.0",
        "wan.base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "wan.base_digest": "0f3a",
        "wan.run": "rabbits",
        "wan.step": "40",
        "wan.software": "wan-train 0.1.0",
        **(kohya if format == "kohya" else {}),
    }


def test_what_is_unknown_is_not_stated(tmp_path: Path, small_config: WanConfig) -> None:
    settings, path = LoraSettings(4), tmp_path / "style.safetensors"
    save_lora(drawn_adapters(small_config, settings), settings, small_config, path, format="kohya")
    found = metadata_of(path)
    assert found["wan.software"].startswith("wan-model ")
    assert not found.keys() & {"wan.base", "wan.base_digest", "wan.run", "wan.step", "ss_sd_model_name", "ss_steps"}


# -- refusals ---------------------------------------------------------------------------------------------------------

KEY = "blocks.1.attn2.to_k.lora_B.weight"


def bad(name: str, tensors: Tensors) -> Tensors:
    if name == "missing":
        del tensors[KEY]
    elif name == "unknown":
        tensors["blocks.2.attn2.to_k.lora_B.weight"] = tensors[KEY]
    elif name == "shape":
        tensors[KEY] = tensors[KEY].t()
    elif name == "integers":
        tensors[KEY] = tensors[KEY].int()
    else:
        tensors[KEY][1, 2] = float(name)
    return tensors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tensors": "missing"}, f"{KEY} is missing (expected [60, 4])"),
        ({"tensors": "unknown"}, "blocks.2.attn2.to_k.lora_B.weight is unknown; expected those of the settings'"),
        ({"tensors": "shape"}, f"{KEY} has the shape [4, 60]; expected [60, 4]"),
        ({"tensors": "integers"}, f"{KEY} is of type torch.int32; expected floating-point numbers"),
        ({"tensors": "nan"}, f"{KEY} of the LoRA holds values that are not finite"),
        ({"tensors": "-inf"}, f"{KEY} of the LoRA holds values that are not finite"),
        ({"tensors": "70000", "dtype": "float16"}, f"{KEY} of the LoRA holds 7e+04, which torch.float16 cannot hold"),
        ({"format": "a1111"}, "the format of the LoRA is 'a1111'; expected one of diffusers, comfyui, kohya"),
        ({"dtype": "float8"}, "the precision of the LoRA is 'float8'; expected one of stored, bfloat16, float16"),
        ({"path": "style.pt"}, "the name of the LoRA is style.pt; expected one that ends with .safetensors"),
    ],
)
def test_refused_in_one_sentence_and_an_earlier_file_stays(
    tmp_path: Path, small_config: WanConfig, given: dict[str, Any], said: str
) -> None:
    settings = LoraSettings(4)
    tensors = drawn_adapters(small_config, settings)
    path = tmp_path / given.pop("path", "style.safetensors")
    path.write_bytes(b"earlier")
    tensors = bad(given.pop("tensors"), tensors) if "tensors" in given else tensors
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        save_lora(tensors, settings, small_config, path, **given)
    assert "\n" not in str(refused.value)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"earlier")]


def test_a_value_that_float16_lacks_is_one_that_bfloat16_has(tmp_path: Path, small_config: WanConfig) -> None:
    settings, path = LoraSettings(4), tmp_path / "style.safetensors"
    tensors = bad("70000", drawn_adapters(small_config, settings))
    save_lora(tensors, settings, small_config, path, dtype="bfloat16")
    assert load_file(path)[f"transformer.{KEY}"][1, 2] == torch.tensor(70000.0).bfloat16()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base": "/home/someone/wan"}, "the base model of the LoRA is '/home/someone/wan'; expected a name without"),
        ({"base": "../wan"}, "the base model of the LoRA is '../wan'; expected a name without its path"),
        ({"base": "a/b/c"}, "the base model of the LoRA is 'a/b/c'"),
        ({"base": "C:\\models\\wan"}, "the base model of the LoRA is"),
        ({"base": ".."}, "the base model of the LoRA is '..'"),
        ({"base": ""}, "the base model of the LoRA is ''"),
        ({"base": "wan\n"}, "the base model of the LoRA is 'wan\\n'"),
        ({"base_digest": "sha256:12"}, "the digest of the base model of the LoRA is 'sha256:12'; expected hexadecimal"),
        ({"run": "runs/rabbits"}, "the run of the LoRA is 'runs/rabbits'; expected a name without its path"),
        ({"software": "./train"}, "the software of the LoRA is './train'; expected a name and a version"),
        ({"step": -1}, "the step of the LoRA is -1; expected 0 or more"),
    ],
)
def test_an_origin_is_names(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LoraOrigin(**given)


def test_tensors_that_share_memory_are_written(tmp_path: Path, small_config: WanConfig) -> None:
    settings, path = LoraSettings(4), tmp_path / "style.safetensors"
    shapes = adapter_shapes(small_config, settings)
    flat = torch.arange(sum(math.prod(shape) for shape in shapes.values())).float()
    pieces = flat.split([math.prod(shape) for shape in shapes.values()])
    tensors = {key: piece.view(shapes[key]) for key, piece in zip(shapes, pieces, strict=True)}
    save_lora(tensors, settings, small_config, path)
    stored = load_file(path)
    assert all(torch.equal(stored[f"transformer.{key}"], tensor) for key, tensor in tensors.items())
    assert path.stat().st_size < 4 * flat.numel() + 20_000
