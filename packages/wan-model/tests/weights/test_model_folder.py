"""What is asked of the hub: the parts that are needed, and of them nothing that could hold code."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from wan_model.weights.model_folder import resolve_folder


def test_a_hub_id_fetches_weights_and_small_files_of_the_named_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        (tmp_path / "transformer").mkdir()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_folder("Wan-AI/some-model", ["transformer"], revision="v2") == tmp_path
    assert (asked.pop("name"), asked.pop("revision")) == ("Wan-AI/some-model", "v2")
    patterns = asked.pop("allow_patterns")
    assert asked == {}, "no token, no code from the hub"

    def fetched(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in patterns)

    assert fetched("model_index.json")
    assert fetched("scheduler/scheduler_config.json")
    assert fetched("tokenizer/tokenizer.json")
    assert fetched("transformer/config.json")
    assert fetched("transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    for other in ("vae/config.json", "transformer/model.bin", "transformer/model.pt", "transformer/code.py", "a.gguf"):
        assert not fetched(other), other


def test_a_part_that_the_hub_did_not_have_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ValueError, match="has no transformer, vae folder; expected a model in diffusers' layout"):
        resolve_folder("Wan-AI/some-model", ["transformer", "vae"])
