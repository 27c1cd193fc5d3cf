"""The tiny model folder: reproducible, and a model that diffusers' own pipeline runs."""

import hashlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_model.tiny import TINY_CONFIG, main, write_tiny_wan
from wan_model.weights.transformer import load_transformer, read_config


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, again = digests(tiny_folder), digests(write_tiny_wan(tmp_path / "again"))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the caller's"
    assert again == first
    other = digests(write_tiny_wan(tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    differing = {name for name in first if first[name] != other[name]}
    assert differing == {name for name in first if name.endswith(".safetensors")}
    assert len(differing) == 3


def test_no_weight_is_left_at_zero(tiny_folder: Path) -> None:
    model = load_transformer(tiny_folder / "transformer")
    assert read_config(tiny_folder / "transformer").to_diffusers() == TINY_CONFIG.to_diffusers()
    assert all(parameter.abs().max() > 0 for parameter in model.parameters())


def test_diffusers_pipeline_samples_from_it(pipeline: Any) -> None:
    frames = pipeline(
        "a rabbit in a meadow",
        negative_prompt="blurred",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert frames.shape == (1, 5, 3, 32, 48)
    assert frames.isfinite().all()
    assert frames.std() > 0.01, "the video shows something"
    sigmas = pipeline.scheduler.sigmas
    assert len(sigmas) == 3
    assert 0.99 < sigmas[0] <= 1, "the path runs from noise to the clean latent"
    assert sigmas[-1] == 0


def test_command_line_prints_where(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As ``python -m wan_model.tiny`` runs it, but for the seconds that a new process spends on imports.
    monkeypatch.setattr(sys, "argv", ["tiny.py", str(tmp_path / "model"), "--seed", "0"])
    monkeypatch.delitem(sys.modules, "wan_model.tiny")
    runpy.run_module("wan_model.tiny", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.strip() == f"wrote a tiny Wan 2.1 with random weights to {tmp_path / 'model'}"
    assert digests(tmp_path / "model") == digests(tiny_folder)


def test_command_line_says_in_one_line_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["tiny.py", str(tmp_path / "file" / "model")])
    with pytest.raises(SystemExit, match=r"^Error: .*Not a directory"):
        main()
