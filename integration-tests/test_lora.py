"""A LoRA from training to videos: the checkpoint, its files in every format and the merged model sample the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from wan_infer import WanSampler
from wan_model.dit.lora import LoraSettings
from wan_model.sampling.settings import Settings
from wan_model.testing.once import Once
from wan_model.tiny import TINY_CONFIG, write_tiny_wan
from wan_train.checkpoint.adapters import export_lora, merge

LORA = ("lora.rank=4", "lora.alpha=8", "lora.use_rslora=true", "ema.decay=0.5")
SIZE: dict[str, Any] = {"width": 32, "height": 32, "frames": 5, "seed": 3}
FORMATS = ("diffusers", "comfyui", "kohya")


@pytest.fixture(scope="module")
def made(run, once: Once) -> Path:
    """A base, a run of four steps on it, and everything that is written out of the run."""

    def make(folder: Path) -> None:
        write_tiny_wan(folder / "base", seed=1)
        training = ("--recipe", "tiny", "--mock", "--init-from", folder / "base", "train.train_iters=4")
        rate = ("optimizer.lr=0.03", "optimizer.min_lr=0.03", "scheduler.lr_warmup_iters=1")
        run("wan-train", "finetune", *training, *rate, *LORA, f"checkpoint.save={folder / 'run'}")
        # What these commands say is for wan-train's tests; each start of one takes seconds.
        merge(folder / "run", folder / "merged")
        for kind in FORMATS:
            export_lora(folder / "run", folder / f"{kind}.safetensors", format=kind)
        export_lora(folder / "run", folder / "ema.safetensors", ema=True)

    return once("lora-files", make)


def latents(sampler: WanSampler, **options: Any) -> torch.Tensor:
    return sampler.sample_latents(["a red circle"], settings=Settings(steps=3, guidance=3.0), **SIZE, **options)


def test_every_way_to_sample_a_lora_gives_the_same_latents(made: Path) -> None:
    base = made / "base"
    plain = latents(WanSampler.from_pretrained(base))
    trained = latents(WanSampler.from_training_checkpoint(made / "run", base))
    assert (trained - plain).norm() > 1e-2 * plain.norm(), "the LoRA changes the video"
    ways = {kind: WanSampler.from_pretrained(base, lora=made / f"{kind}.safetensors") for kind in FORMATS}
    ways["unmerged"] = WanSampler.from_pretrained(base, lora=made / "comfyui.safetensors", lora_mode="unmerged")
    ways["merged"] = WanSampler.from_pretrained(made / "merged", vae_model=base, text_model=base)
    for name, sampler in ways.items():
        assert (latents(sampler) - trained).norm() < 1e-4 * (trained - plain).norm(), name
    assert torch.equal(latents(ways["unmerged"], lora_scale=0.0), plain)
    average = latents(WanSampler.from_training_checkpoint(made / "run", base, ema=True))
    assert (average - trained).norm() > 1e-3 * plain.norm()
    from_file = latents(WanSampler.from_pretrained(base, lora=made / "ema.safetensors"))
    assert (from_file - average).norm() < 1e-4 * (average - plain).norm()


def test_the_command_names_run_and_base(run, made: Path, tmp_path: Path) -> None:
    models = ("--checkpoint-dir", made / "run", "--model", made / "base", "--prompts", "a red circle")
    size = ("--sizes", "32*32", "--frame_nums", "1", "--sample-steps", "1", "--json")
    (video,) = json.loads(run("wan-infer", *models, *size, "--save_file", tmp_path / "one.png").stdout)["videos"]
    assert (video["transformer"], video["checkpoint_step"]) == ("run on base", 4)


def test_another_base_or_none_is_refused(made: Path, tmp_path: Path) -> None:
    base, other = made / "base", tmp_path / "other"
    with pytest.raises(ValueError, match="holds a LoRA, which was trained on"):
        WanSampler.from_training_checkpoint(made / "run", None, vae_model=base, text_model=base)
    write_tiny_wan(other, config=dataclasses.replace(TINY_CONFIG, num_layers=3))
    with pytest.raises(ValueError, match="whose transformer has other sizes than that of"):
        WanSampler.from_training_checkpoint(made / "run", other)


def test_the_settings_of_the_run_are_those_of_its_files(made: Path) -> None:
    with safe_open(made / "diffusers.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["wan.run"], metadata["wan.step"], metadata["wan.base"]) == ("run", "4", "base")
    stated = json.loads(metadata["lora_adapter_metadata"])
    settings = LoraSettings(rank=4, alpha=8.0, use_rslora=True)
    assert stated["transformer.r"] == settings.rank
    assert stated["transformer.lora_alpha"] == settings.alpha
    assert stated["transformer.use_rslora"] is True
