"""LoRA beside the weights: equal to merged LoRA and to diffusers' adapters, other scales without loading again."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from infer_command import QUICK, refused, run
from safetensors.torch import save_file
from tiny_sources import write_checkpoint_of
from torch import Tensor

from wan_infer.loading import lora_unmerged, sources
from wan_infer.loading.lora_unmerged import UnmergedLoras, check_unmerged
from wan_infer.runtime.placement import Placement
from wan_infer.sampling.sampler import WanSampler
from wan_model import PackLayout, WanDiT, patchify
from wan_model.dit.lora import AdaptableLinear
from wan_model.sampling.settings import Settings
from wan_model.testing import assert_all_within, rounding_scale, seeds
from wan_model.testing.lora_files import (
    Tensors,
    base_weights,
    comfy,
    kohya,
    lightx2v,
    pipeline_with_adapters,
    tiny_lora,
)
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.lora_config import METADATA_KEY
from wan_model.weights.lora_reading import merge_loras, read_lora

pytestmark = [
    # peft about the second adapter of a model.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
WEIGHTS = base_weights()
LAYOUT = PackLayout(((2, 3, 4), (1, 2, 5)))
TIMESTEPS = torch.tensor([900.4, 37.25])
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"width": 32, "height": 48, "frames": 5}
FAST = Settings(steps=2, negative_prompt="grey")


def rslora() -> tuple[Tensors, dict[str, str]]:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "linear_1", "linear_2", "time_proj"]
    config = {
        "r": 5,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {"attn1.to_q": 2},
        "target_modules": targets,
    }
    metadata = {METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    return comfy(ab=True, alpha=None, ranks=(5,)), metadata


FILES: dict[str, Any] = {
    "alpha": lambda: (kohya(alpha=6.0), None),
    "the embedders too, other ranks": lambda: (comfy(ab=True, alpha=None, ranks=(2, 3)), None),
    "rsLoRA": rslora,
}
CASES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "one file with an alpha": (("alpha",), (0.7,)),
    "one file with rsLoRA": (("rsLoRA",), (-0.4,)),
    "two files": (("alpha", "the embedders too, other ranks"), (0.7, -0.3)),
    "three files, one without effect": (("alpha", "the embedders too, other ranks", "rsLoRA"), (0.3, 0.0, 0.6)),
}


def write_case(folder: Path, case: str) -> list[Path]:
    """The files of a case, in its order."""
    paths = []
    for i, name in enumerate(CASES[case][0]):
        tensors, metadata = FILES[name]()
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1], metadata)
    return paths


def unmerged(paths: Sequence[Path], dtype: torch.dtype = torch.float32) -> tuple[WanDiT, UnmergedLoras]:
    """The model with adapters, as ``TransformerSource.load`` makes it, and the adapters."""
    model = WanDiT(TINY_CONFIG)
    model.load_state_dict(WEIGHTS)
    if dtype == torch.float64:
        model.double()
    model.to_precision(dtype)
    loras = UnmergedLoras([read_lora(path, TINY_CONFIG) for path in paths])
    loras.add_to(model)
    loras.fill(model)
    return model.requires_grad_(False), loras


def merged(paths: Sequence[Path], scales: Sequence[float]) -> WanDiT:
    model = WanDiT(TINY_CONFIG)
    model.load_state_dict(WEIGHTS)
    merge_loras([read_lora(path, TINY_CONFIG, scale) for path, scale in zip(paths, scales, strict=True)], model)
    return model


class Inputs:
    """Two latents with their texts."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        shapes = [(TINY_CONFIG.in_channels, f, 2 * h, 2 * w) for f, h, w in LAYOUT.grids]
        self.latents = [torch.randn(shape, generator=rng) for shape in shapes]
        self.texts = torch.randn(len(shapes), TINY_CONFIG.text_length, TINY_CONFIG.text_dim, generator=rng)

    @torch.no_grad()
    def ours(self, model: WanDiT) -> dict[str, Tensor]:
        """The velocity; keys and values of the texts are computed beforehand, as in sampling."""
        dtype = model.proj_out.weight.dtype
        tokens = torch.cat([patchify(x) for x in self.latents]).to(dtype)
        return {"velocity": model(tokens, TIMESTEPS, model.prepare_text(self.texts.to(dtype)), LAYOUT)}

    @torch.no_grad()
    def theirs(self, model: Any) -> dict[str, Tensor]:
        parts = [
            model(latent[None], TIMESTEPS[i : i + 1], self.texts[i : i + 1], return_dict=False)[0][0]
            for i, latent in enumerate(self.latents)
        ]
        return {"velocity": torch.cat([patchify(part) for part in parts])}


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(5))
@pytest.mark.parametrize("case", CASES)
def test_equal_to_merged_weights_and_to_the_adapters_of_diffusers(tmp_path: Path, case: str, seed: int) -> None:
    pytest.importorskip("peft")
    files, scales, inputs = write_case(tmp_path, case), CASES[case][1], Inputs(seed)
    model, loras = unmerged(files)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    double, double_loras = unmerged(files, torch.float64)
    base = inputs.ours(double)["velocity"]
    loras.set_scales(scales, CPU)
    double_loras.set_scales(scales, CPU)
    exact, scale = inputs.ours(double), rounding_scale(lambda: inputs.ours(double))
    assert (base - exact["velocity"]).norm() > 0.01 * base.norm(), "the adapters change the result"
    assert_all_within(inputs.ours(model), exact, scale)
    assert_all_within(inputs.ours(merged(files, scales)), exact, scale)
    assert_all_within(inputs.theirs(pipeline_with_adapters(WEIGHTS, files, scales).transformer), exact, scale)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.rounding
@pytest.mark.parametrize("case", ["one file with rsLoRA", "two files"])
@pytest.mark.parametrize("seed", seeds(6))
def test_bfloat16_differs_by_rounding(tmp_path: Path, case: str, seed: int) -> None:
    inputs, (model, loras) = Inputs(seed), unmerged(write_case(tmp_path, case), torch.bfloat16)
    loras.set_scales(CASES[case][1], CPU)
    embedder = "condition_embedder.time_embedder.linear_1"
    for name, dtype in (("blocks.0.attn1.to_q", torch.bfloat16), (embedder, torch.float32)):
        linear: Any = model.get_submodule(name)
        assert linear.lora_A.weight.dtype == linear.lora_B.weight.dtype == linear.weight.dtype == dtype
    double = copy.deepcopy(model).double()
    scale = rounding_scale(lambda: inputs.ours(double), torch.bfloat16)
    assert_all_within(inputs.ours(model), inputs.ours(double), scale)


def test_scales_of_zero_are_the_weights_alone_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(kohya(), tmp_path / "a.safetensors")
    model, loras = unmerged([tmp_path / "a.safetensors"] * 2)
    inputs, plain = Inputs(1), WanDiT(TINY_CONFIG)
    plain.load_state_dict(WEIGHTS)
    wanted, used = inputs.ours(plain)["velocity"], []
    matrix = AdaptableLinear.whole_gradient
    monkeypatch.setattr(
        AdaptableLinear, "whole_gradient", lambda *given, **more: used.append(given) or matrix(*given, **more)
    )
    for scales in ((0.0, 0.0), (0.5, 0.0), (0.0, -0.0)):
        loras.set_scales(scales, CPU)
        used.clear()
        assert torch.equal(inputs.ours(model)["velocity"], wanted) == (not any(scales))
        assert bool(used) == any(scales), "no product is computed in vain"


def test_what_is_no_product_of_a_linear_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    patch = {
        "transformer.patch_embedding.lora_A.weight": torch.ones(2, *WEIGHTS["patch_embedding.weight"].shape[1:]),
        "transformer.patch_embedding.lora_B.weight": torch.ones(TINY_CONFIG.hidden_size, 2, 1, 1, 1),
    }
    zeros = {"diffusion_model.blocks.0.norm3.diff": torch.zeros(TINY_CONFIG.hidden_size)}
    for tensors, key in (
        (patch, "patch_embedding.weight"),
        (lightx2v(), r"\S+\.bias"),
        ({"diffusion_model.blocks.0.norm3.diff": torch.ones(TINY_CONFIG.hidden_size)}, "blocks.0.norm2.weight"),
        ({**tiny_lora(), **zeros}, None),
    ):
        save_file(tensors, path)
        lora = read_lora(path, TINY_CONFIG)
        if key is None:
            check_unmerged(lora, TINY_CONFIG, path)
            continue
        with pytest.raises(ValueError, match=rf"style\.safetensors changes {key} by what is no product .*; merge it"):
            check_unmerged(lora, TINY_CONFIG, path)


# -- the sampler ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("style", "motion")]
    for seed, path in enumerate(paths):
        save_file(tiny_lora(rank=3 + seed, seed=seed, alpha=1.5), path)
    return paths


def off_by(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_scales_of_a_call_load_nothing_again(
    model_folder: Path, two_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = WanSampler.from_pretrained(
        model_folder, device="cpu", lora=[(two_files[0], 0.1), (two_files[1], -0.05)], lora_mode="unmerged"
    )
    first = sampler.sample_latents(["a"], settings=FAST, **SMALL)
    places = {key: value.data_ptr() for key, value in sampler.model.state_dict().items()}

    def forbidden(*arguments: object, **more: object) -> None:
        raise AssertionError("a file is read again")

    for place, name in (
        (sources, "load_weights"), (sources, "merge_loras"), (lora_unmerged, "local_slices"),
        (WanSampler, "_read_loras"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, forbidden)
    others = {
        scale: sampler.sample_latents(["a"], settings=FAST, lora_scale=scale, **SMALL)
        for scale in (0.0, (0.0, 0.1), 0.2)
    }
    assert torch.equal(sampler.sample_latents(["a"], settings=FAST, **SMALL), first), "a call leaves nothing behind"
    assert {key: value.data_ptr() for key, value in sampler.model.state_dict().items()} == places
    monkeypatch.undo()
    plain = WanSampler.from_pretrained(model_folder, device="cpu").sample_latents(["a"], settings=FAST, **SMALL)
    assert torch.equal(others.pop(0.0), plain)
    others[0.1, -0.05] = first
    for scale, got in others.items():
        pair = (scale, scale) if isinstance(scale, float) else scale
        own = WanSampler.from_pretrained(model_folder, device="cpu", lora=list(zip(two_files, pair, strict=True)))
        wanted = own.sample_latents(["a"], settings=FAST, **SMALL)
        assert off_by(got, wanted) < 1e-4
        assert off_by(plain, wanted) > 0.01


def test_a_training_checkpoint_has_adapters_beside_it(
    model_folder: Path, two_files: list[Path], tmp_path: Path
) -> None:
    write_checkpoint_of(model_folder, tmp_path / "run", 10)
    found = [
        WanSampler.from_training_checkpoint(
            tmp_path / "run", model_folder, device="cpu", lora=(two_files[0], 0.1), lora_mode=mode
        ).sample_latents(["a"], settings=FAST, **SMALL)
        for mode in ("merged", "unmerged")
    ]
    assert off_by(found[1], found[0]) < 1e-4


def test_adapters_are_offloaded_with_the_weights(model_folder: Path, two_files: list[Path]) -> None:
    loras: list[Any] = [(path, 0.1) for path in two_files]
    sampler = WanSampler.from_pretrained(model_folder, device="cpu", lora=loras, lora_mode="unmerged")
    wanted = sampler.sample_latents(["a"], settings=FAST, lora_scale=(0.1, 0.2), **SMALL)
    # Another name of the CPU, so that the two devices can be told apart.
    device = torch.device("cpu", 0)
    sampler.placement = Placement(device, torch.float32, device, offload=True)
    places = {key: value.data_ptr() for key, value in sampler.model.state_dict().items()}
    computing: list[dict[str, int]] = []
    handle = sampler.model.proj_out.register_forward_pre_hook(
        lambda *_: computing.append({key: value.data_ptr() for key, value in sampler.model.state_dict().items()})
    )
    assert torch.equal(sampler.sample_latents(["a"], settings=FAST, lora_scale=(0.1, 0.2), **SMALL), wanted)
    handle.remove()
    assert all(here[key] != places[key] for here in computing for key in places), "computed with a copy"
    assert {key: value.data_ptr() for key, value in sampler.model.state_dict().items()} == places


REFUSED = {
    "scales of merged files": ({"lora": True}, 0.5, "has the LoRA scale 0.5 and the LoRA is merged into the weights; "),
    "scales of no file": ({"lora_mode": "unmerged"}, 0.5, "has the LoRA scale 0.5 and there is no LoRA; make the"),
    "too many": ({"lora": True, "lora_mode": "unmerged"}, (1.0, 2.0, 3.0), "got 3 scales of 2 LoRA; expected one for"),
    "none": ({"lora": True, "lora_mode": "unmerged"}, (), "got 0 scales of 2 LoRA; expected one for all or one each"),
    "no number": ({"lora": True, "lora_mode": "unmerged"}, float("nan"), "the scale of a LoRA is nan; expected a"),
    "beyond float32": ({"lora": True, "lora_mode": "unmerged"}, 1e39, "by a factor beyond those of float32; check"),
    "a mode": ({"lora_mode": "fused"}, None, "there is no LoRA mode 'fused'; expected merged or unmerged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scales_that_cannot_be_meant(case: str, model_folder: Path, two_files: list[Path]) -> None:
    options, scale, said = REFUSED[case]
    given = {**options, "lora": two_files} if options.get("lora") else options
    with pytest.raises(ValueError, match=said):
        WanSampler.from_pretrained(model_folder, device="cpu", **given).sample_latents(
            ["a"], settings=FAST, lora_scale=scale, **SMALL
        )


# -- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def latents_of_commands() -> Iterator[list[Tensor]]:
    """The latents that the command samples meanwhile, which its files hold after decoding and encoding only."""
    found: list[Tensor] = []
    sample = WanSampler.sample_latents

    def recording(self: WanSampler, *arguments: Any, **more: Any) -> Tensor:
        found.append(sample(self, *arguments, **more))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanSampler, "sample_latents", recording)
        yield found


def test_lines_of_a_prompt_file_have_their_own_scales(
    model_folder: Path, two_files: list[Path], tmp_path: Path
) -> None:
    lines = [{"prompt": "a", "lora_scale": [0.1, -0.05]}, {"prompt": "a", "lora_scale": 0.02}, {"prompt": "a"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    shared = ("--model", model_folder, "--output-folder", tmp_path / "videos", "--json", *QUICK, "--lora", *two_files)
    loads: list[object] = []
    load = sources.TransformerSource.load

    def counted(self: sources.TransformerSource, **more: Any) -> WanDiT:
        loads.append(self)
        return load(self, **more)

    with latents_of_commands() as together, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.TransformerSource, "load", counted)
        done = run("--prompts-file", prompts, *shared, "--lora-mode", "unmerged", "--lora-scale", 0)
    assert done.exit_code == 0, done.stderr
    assert len(loads) == 1
    videos = json.loads(done.stdout)["videos"]
    assert [video["lora"] for video in videos] == [
        "style.safetensors x 0.1, motion.safetensors x -0.05",
        "style.safetensors x 0.02, motion.safetensors x 0.02",
        "style.safetensors x 0, motion.safetensors x 0",
    ]
    assert [video["lora_mode"] for video in videos] == ["unmerged"] * 3
    assert len({video["file"] for video in videos}) == 3
    for got, scales in zip(together, ((0.1, -0.05), (0.02,), (0,)), strict=True):
        with latents_of_commands() as alone:
            done = run("--prompts", "a", *shared, "--lora-scale", *scales)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["videos"][0]["lora_mode"] == "merged"
        assert off_by(got, alone[0]) < 1e-4
    assert off_by(together[0], together[2]) > 0.01
    assert off_by(together[1], together[2]) > 0.001
    said = refused("--prompts-file", prompts, *shared)
    assert "prompts.jsonl, line 1: lora_scale needs LoRA files that are not merged: give --lora and --lora-mode" in said
    said = refused("--prompts-file", prompts, *shared, two_files[0], "--lora-mode", "unmerged")
    assert "prompts.jsonl, line 1: got 2 scales of 3 LoRA; expected one for all or one each" in said


def test_what_can_only_be_merged_is_said_before_anything_is_loaded(model_folder: Path, tmp_path: Path) -> None:
    save_file(lightx2v(), tmp_path / "fast.safetensors")
    shared = ("--model", model_folder, "--prompts", "a", "--save-file", tmp_path / "a.mp4", *QUICK)
    said = refused(*shared, "--lora", tmp_path / "fast.safetensors", "--lora-mode", "unmerged")
    assert re.search(r"fast\.safetensors changes blocks\.\S+\.bias by what is no product of two matrices", said)
    assert "--lora-mode unmerged needs --lora, the files" in refused(*shared, "--lora-mode", "unmerged")
