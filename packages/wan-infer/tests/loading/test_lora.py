"""LoRA merged when the weights are loaded: the plain formula, scales, precision, and what the sampler records."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_infer.sampling.sampler import WanSampler
from wan_model.sampling.settings import Settings
from wan_model.testing.lora_files import CHANGED, tiny_lora
from wan_model.weights.lora_reading import WEIGHTS_NAME

SMALL = {"width": 32, "height": 48, "frames": 5}


@pytest.mark.parametrize(
    ("alpha", "in_metadata", "scale", "factor"),
    [(None, None, 1.0, 1.0), (6.0, None, 0.5, 1.0), (None, 1.5, 2.0, 1.0), (None, None, 0.0, 0.0)],
)
def test_merged_weights_are_the_formula(
    model_folder: Path, tmp_path: Path, alpha: float | None, in_metadata: float | None, scale: float, factor: float
) -> None:
    tensors = tiny_lora(alpha=alpha)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": in_metadata, "transformer.r": 3})}
    save_file(tensors, tmp_path / WEIGHTS_NAME, metadata if in_metadata else None)
    plain = WanSampler.from_pretrained(model_folder, device="cpu").model.state_dict()
    changed = WanSampler.from_pretrained(model_folder, device="cpu", lora=(tmp_path, scale)).model.state_dict()
    for key, weight in changed.items():
        wanted, name = plain[key], key.removesuffix(".weight")
        if name in CHANGED and key.endswith("weight"):
            down, up = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
            wanted = wanted + factor * up @ down
        torch.testing.assert_close(weight, wanted, atol=1e-5, rtol=1e-5)


def test_the_video_changes_with_the_scale_and_the_record_says_so(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(tiny_lora(), path)
    samplers = [WanSampler.from_pretrained(model_folder, device="cpu", lora=(path, scale)) for scale in (0.0, 0.05)]
    none, some = (own.sample_latents(["a"], settings=Settings(steps=2), **SMALL) for own in samplers)
    assert float((some - none).norm() / none.norm()) > 0.01
    assert samplers[1].lora_record == "style.safetensors x 0.05"


def test_one_file_or_several_with_scales_or_without(model_folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for seed, path in enumerate((one, two)):
        save_file(tiny_lora(seed=seed), path)
    records = []
    for lora in (one, str(one), (one, 0.5), [one, two], [(one, 0.5), (two, -1.0)], [(one, 0.5)], ((one, 0.5), two), []):
        sampler = WanSampler.from_pretrained(model_folder, device="cpu", lora=lora)
        records.append(sampler.lora_record)
    assert records == [
        *("one.safetensors x 1", "one.safetensors x 1", "one.safetensors x 0.5"),
        *("one.safetensors x 1, two.safetensors x 1", "one.safetensors x 0.5, two.safetensors x -1"),
        *("one.safetensors x 0.5", "one.safetensors x 0.5, two.safetensors x 1", None),
    ]
    key = f"{CHANGED[0]}.weight"
    plain, *changed = (
        WanSampler.from_pretrained(model_folder, device="cpu", lora=lora).model.get_parameter(key)
        for lora in ([], (one, 0.5), (two, -1.0), [(one, 0.5), (two, -1.0)])
    )
    torch.testing.assert_close(changed[2] - plain, (changed[0] - plain) + (changed[1] - plain), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"the scale of the LoRA .*one.safetensors is inf"):
        WanSampler.from_pretrained(model_folder, device="cpu", lora=[one, (two, 1.0), (one, float("inf"))])


def test_bfloat16_weights_are_changed_once_rounded(model_folder: Path, tmp_path: Path) -> None:
    save_file(tiny_lora(), tmp_path / WEIGHTS_NAME)
    exact = WanSampler.from_pretrained(model_folder, device="cpu", lora=(tmp_path, 1.0)).model
    coarse = WanSampler.from_pretrained(model_folder, device="cpu", dtype="bfloat16", lora=(tmp_path, 1.0)).model
    key = f"{CHANGED[0]}.weight"
    got, wanted = coarse.get_parameter(key), exact.get_parameter(key)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - wanted).norm() / wanted.norm()) < 2**-8


def test_a_change_that_overflows_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Each value of the file is finite; their product is not."""
    save_file({key: torch.full_like(tensor, 1e30) for key, tensor in tiny_lora().items()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"the LoRA changes \S+ to values beyond those of float32; check its scale"):
        _ = WanSampler.from_pretrained(model_folder, device="cpu", lora=(tmp_path, 1.0)).model
