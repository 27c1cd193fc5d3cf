"""The checkpoints of a LoRA run as a LoRA with scales, and a LoRA on other weights than it was trained on."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from infer_command import QUICK, refused, run
from safetensors.torch import save_file
from tiny_sources import write_adapters, write_checkpoint_of
from torch import Tensor

from wan_infer.sampling.sampler import WanSampler
from wan_model.dit.lora import LoraSettings
from wan_model.sampling.settings import Settings
from wan_model.testing.lora_files import tiny_lora
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.base_digest import joint_digest, tensor_digests
from wan_model.weights.lora_file import LoraOrigin, save_lora
from wan_model.weights.transformer import load_transformer, save_transformer

SETTINGS = LoraSettings(rank=2, alpha=6.0, targets=("attn1.*", "ffn.net.2"))
SMALL: dict[str, Any] = {"width": 32, "height": 48, "frames": 5, "settings": Settings(steps=2)}


@pytest.fixture(scope="module")
def other_base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one other weight."""
    folder = tmp_path_factory.mktemp("other") / "elsewhere"
    shutil.copytree(model_folder, folder)
    state = load_transformer(folder / "transformer").state_dict()
    state["proj_out.weight"] = state["proj_out.weight"] * 1.01
    save_transformer(state, TINY_CONFIG, folder / "transformer")
    return folder


@pytest.fixture
def lora_run(model_folder: Path, tmp_path: Path) -> Path:
    write_adapters(model_folder, tmp_path / "dogs", 20, SETTINGS)
    return tmp_path / "dogs"


def latents(sampler: WanSampler, **options: Any) -> Tensor:
    return sampler.sample_latents(["a"], **SMALL, **options)


def off_by(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_a_run_is_a_lora_with_scales(model_folder: Path, lora_run: Path) -> None:
    """As its checkpoint on its base, with any scale, merged and not."""
    whole = latents(WanSampler.from_training_checkpoint(lora_run, model_folder, device="cpu"))
    beside = WanSampler.from_pretrained(model_folder, device="cpu", lora=(lora_run, 0.4), lora_mode="unmerged")
    plain = latents(WanSampler.from_pretrained(model_folder, device="cpu"))
    assert off_by(whole, plain) > 0.01
    assert off_by(latents(beside, lora_scale=1.0), whole) < 1e-5
    assert torch.equal(latents(beside, lora_scale=0.0), plain)
    merged = WanSampler.from_pretrained(model_folder, device="cpu", lora=(lora_run / "iter_0000020", 0.4))
    assert off_by(latents(merged), latents(beside)) < 1e-5
    assert merged.lora_record == beside.lora_record == "dogs/iter_0000020 x 0.4"


def test_a_newer_checkpoint_does_not_mix_into_a_sampler(model_folder: Path, lora_run: Path) -> None:
    sampler = WanSampler.from_pretrained(model_folder, device="cpu", lora=lora_run)
    wanted = latents(WanSampler.from_pretrained(model_folder, device="cpu", lora=lora_run))
    write_adapters(model_folder, lora_run, 30, SETTINGS, seed=9)
    assert torch.equal(latents(sampler), wanted)
    newest = WanSampler.from_pretrained(model_folder, device="cpu", lora=lora_run)
    assert newest.lora_record == "dogs/iter_0000030 x 1"
    assert off_by(latents(newest), wanted) > 0.01


def test_runs_that_are_no_lora_of_this_transformer_are_refused(model_folder: Path, tmp_path: Path) -> None:
    write_checkpoint_of(model_folder, tmp_path / "whole", 10)
    shared = ("--model", model_folder, "--prompts", "a", "--save_file", tmp_path / "a.mp4", *QUICK)
    assert "holds the weights of a model, not a LoRA" in refused(*shared, "--lora", tmp_path / "whole")
    (tmp_path / "begun" / "iter_0000010").mkdir(parents=True)
    assert "begun" in refused(*shared, "--lora", tmp_path / "begun")
    write_adapters(model_folder, tmp_path / "run", 10, SETTINGS)
    record = tmp_path / "run" / "iter_0000010" / "run_config.yaml"
    record.write_text(record.read_text().replace(f"num_layers: {TINY_CONFIG.num_layers}", "num_layers: 1"))
    said = refused(*shared, "--lora", tmp_path / "run")
    assert re.search(r"was trained on .*, whose transformer has other sizes than this one of 2 layers", said), said


def warned(*arguments: object) -> list[str]:
    done = run(*arguments, "--prompts", "a", *QUICK)
    assert done.exit_code == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("Warning: the LoRA ")]


def test_a_lora_on_other_weights_is_applied_with_a_warning(
    model_folder: Path, other_base: Path, lora_run: Path, tmp_path: Path
) -> None:
    adapters = write_adapters(model_folder, tmp_path / "again", 20, SETTINGS)
    digest = joint_digest(tensor_digests(model_folder / "transformer"))
    file, unknown = tmp_path / "own.safetensors", tmp_path / "unknown.safetensors"
    save_lora(adapters, SETTINGS, TINY_CONFIG, file, origin=LoraOrigin(base="tiny", base_digest=digest))
    save_file(tiny_lora(), unknown)
    out = ("--save_file", tmp_path / "a.mp4")
    ways: tuple[tuple[object, ...], ...] = (
        ("--lora", file, unknown), ("--lora", lora_run, "--lora-mode", "unmerged"), ("--checkpoint-dir", lora_run),
    )  # fmt: skip
    for way in ways:
        assert warned(*way, "--model", model_folder, *out) == []
        (line,) = warned(*way, "--model", other_base, *out)
        assert " was trained on tiny, whose weights are not those of elsewhere (digest " in line, line
        assert digest[:12] in line
        assert line.endswith("it is applied all the same")
    assert warned("--lora", unknown, "--model", other_base, *out) == []
    changed = latents(WanSampler.from_pretrained(other_base, device="cpu", lora=file))
    assert off_by(changed, latents(WanSampler.from_pretrained(other_base, device="cpu"))) > 0.01


def test_weights_of_a_checkpoint_have_no_digest_to_compare(model_folder: Path, lora_run: Path, tmp_path: Path) -> None:
    write_checkpoint_of(model_folder, tmp_path / "whole", 10)
    sampler = WanSampler.from_training_checkpoint(tmp_path / "whole", model_folder, device="cpu", lora=lora_run)
    assert sampler.foreign_loras() == []
