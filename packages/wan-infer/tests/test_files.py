"""Files that the command reads or writes: damaged ones, what may not be used, and what stands in their place."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from infer_command import QUICK, refused
from safetensors.torch import load_file, save_file

from wan_model.testing.lora_files import tiny_lora
from wan_model.testing.permissions import permissions_apply

DAMAGES: dict[str, tuple[str, bytes]] = {
    "transformer cut": ("transformer/diffusion_pytorch_model.safetensors", b"\x10"),
    "autoencoder cut": ("vae/diffusion_pytorch_model.safetensors", b"\x10"),
    "text encoder cut": ("text_encoder/model.safetensors", b"\x10"),
    "tokenizer cut": ("tokenizer/tokenizer.json", b'{"version": "'),
    "sizes missing": ("vae/config.json", b'{"_class_name": "AutoencoderKLWan"}'),
    "another model": ("transformer/config.json", b'{"_class_name": "FluxTransformer2DModel"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_named_in_one_sentence(model_folder: Path, tmp_path: Path, damage: str) -> None:
    damaged = shutil.copytree(model_folder, tmp_path / "damaged")
    file, content = DAMAGES[damage]
    (damaged / file).write_bytes(content)
    said = refused("--model", damaged, "--prompts", "a", "--save_file", tmp_path / "out.mp4", *QUICK)
    assert str(damaged) in said
    assert not (tmp_path / "out.mp4").exists()


@pytest.fixture
def given(model_folder: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Callable[[Path], list[object]]:
    """In ``tmp_path`` a copy of all that the command reads; gives the flags with which it reads one of the files."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "peft").mkdir()
    for name in ("style.safetensors", "peft/adapter_model.safetensors"):
        save_file(tiny_lora(), tmp_path / name)
    write_checkpoint(tmp_path / "run", 10)

    def flags(file: Path) -> list[object]:
        of_part = {
            "prompts.jsonl": ["--prompts-file", file],
            "style.safetensors": ["--lora", file],
            "peft": ["--lora", tmp_path / "peft"],
            "run": ["--checkpoint-dir", tmp_path / "run"],
        }.get(file.relative_to(tmp_path).parts[0], [])
        prompts = [] if "--prompts-file" in of_part else ["--prompts", "a"]
        return ["--model", tmp_path / "model", *prompts, *of_part, "--save_file", tmp_path / "out.mp4", *QUICK]

    return flags


WEIGHTS = [
    "style.safetensors", "model/transformer/diffusion_pytorch_model.safetensors",
    "model/vae/diffusion_pytorch_model.safetensors", "model/text_encoder/model.safetensors",
]  # fmt: skip
TEXTS = [
    "prompts.jsonl", "peft/adapter_config.json", "run/iter_0000010/run_config.yaml",
    "model/transformer/config.json", "model/vae/config.json", "model/text_encoder/config.json",
    "model/tokenizer/tokenizer.json", "model/model_index.json",
    "model/transformer/diffusion_pytorch_model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", ["model/transformer", *WEIGHTS, *TEXTS])
def test_what_may_not_be_read_is_named(name: str, given: Callable[[Path], list[object]], tmp_path: Path) -> None:
    file = tmp_path / name
    if not file.exists():
        file.write_text("{}")
    mode = file.stat().st_mode
    file.chmod(0)
    try:
        with permissions_apply():
            said = refused(*given(file))
    finally:
        file.chmod(mode)
    assert str(file) in said
    assert "Permission denied" in said
    assert "No such file" not in said


@pytest.mark.parametrize("name", [*WEIGHTS, *TEXTS, "run/iter_0000010/.metadata"])
def test_what_stands_in_the_place_of_a_file_is_named_at_once(
    name: str, given: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    said = refused(*given(file))
    assert f"{file} is a named pipe; expected a file" in said
    file.unlink()
    file.touch()
    os.truncate(file, 30 << 30)
    said = refused(*given(file))
    assert (
        f"{file} is not a complete safetensors file" if name in WEIGHTS else f"{file} has 32,212,254,720 bytes"
    ) in said
    if name in TEXTS:
        file.write_text("[" * 100_000)
        said = refused(*given(file))
        place = f"{file}, line 1: it" if file.suffix == ".jsonl" else str(file)
        assert re.search(rf"{re.escape(place)} is n.* 100 levels deep$", said)


def test_damaged_weights_leave_no_file(model_folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(model_folder, tmp_path / "damaged")
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["proj_out.bias"][3] = float("nan")
    save_file(state, weights)
    said = refused("--model", damaged, "--prompts", "a", "--output_folder", tmp_path / "videos", *QUICK)
    assert "not finite" in said
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize("flag", ["--output-folder", "--save-file", "--contact-sheet"])
def test_a_folder_that_may_not_be_written_to_is_named_before_a_model_is_loaded(flag: str, tmp_path: Path) -> None:
    place = tmp_path / "others"
    place.mkdir(0o555)
    path = place / "new" / {"--output-folder": "", "--save-file": "a.mp4", "--contact-sheet": "a.png"}[flag]
    # The folder has no model: that would be said if it came first.
    with permissions_apply():
        said = refused("--model", tmp_path, "--prompts", "a", *QUICK, flag, path)
    assert re.search(rf"cannot write {path}.*: {place} may not be written to$", said)
    assert list(place.iterdir()) == []
