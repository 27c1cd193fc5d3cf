"""The names that users import, and the README's Python code."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from safetensors.torch import save_file

import wan_infer
from wan_infer import WanSampler, read_video
from wan_infer.request.options import ComputeOptions, ModelSources, SamplerOptions, parse_options
from wan_model.testing.lora_files import tiny_lora

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", wan_infer.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(wan_infer, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'wan_infer' has no attribute 'WanTrainer'"):
        _ = wan_infer.WanTrainer


def test_importing_the_package_imports_no_torch() -> None:
    script = (
        "import sys, wan_infer; print(*sys.modules); from wan_infer import WanSampler; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "wan_infer" in done.stdout.split()
    assert not set(done.stdout.split()) & {"torch", "numpy", "av", "PIL", "click"}


def test_options_of_the_constructors_are_the_fields_of_the_dataclasses() -> None:
    fields = {**get_type_hints(ModelSources), **get_type_hints(ComputeOptions)}
    # What the constructors have arguments of their own for.
    arguments = ("model", "checkpoint", "step", "ema")
    assert get_type_hints(SamplerOptions) == {name: kind for name, kind in fields.items() if name not in arguments}
    sources, options = parse_options({"tiles": 2, "vae_model": "b"}, model="a", step=3)
    assert sources == ModelSources(model="a", step=3, vae_model="b")
    assert options == dataclasses.replace(ComputeOptions(), tiles=2)


@pytest.mark.parametrize("arguments", [("a",), ("a", "b")])
def test_an_option_that_does_not_exist_is_named(arguments: tuple[str, ...]) -> None:
    construct = WanSampler.from_pretrained if len(arguments) == 1 else WanSampler.from_training_checkpoint
    with pytest.raises(TypeError, match=r"there is no option devise; expected some of revision, .*, device, dtype"):
        construct(*arguments, devise="cpu")  # type: ignore[arg-type, call-arg]


def test_too_few_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="0 tiles; expected at least 1"):
        ComputeOptions(tiles=0)


def python_of_the_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_python_code_of_the_readme_runs(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = python_of_the_readme()
    # The same calls at a size for a CPU.
    for written, small in (
        ('"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"', repr(str(model_folder))),
        ("width=832, height=480, frames=81", "width=48, height=32, frames=5, steps=1"),
    ):
        assert block.count(written) == 1
        block = block.replace(written, small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["videos"].shape == (2, 3, 5, 32, 48)  # type: ignore[attr-defined]
    assert read_video(tmp_path / "rabbit.mp4")[0].shape == (5, 32, 48, 3)


def test_python_code_of_the_readme_for_scales_of_lora_runs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, block = python_of_the_readme()
    for written, small in (
        ('"FOLDER"', f'{str(model_folder)!r}, device="cpu"'),
        ('["a red bicycle"], ', '["a red bicycle"], width=48, height=32, frames=1, steps=1, '),
    ):
        assert block.count(written) == 1
        block = block.replace(written, small)
    for seed, name in enumerate(("style", "motion")):
        save_file(tiny_lora(seed=seed), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"WanSampler": WanSampler}
    exec(block, names)
    videos = names["videos"]
    assert isinstance(videos, list)
    assert len(videos) == 3
    assert not any((one == other).all() for one, other in itertools.combinations(videos, 2))
