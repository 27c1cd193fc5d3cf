"""What is said where a package that an extra brings is absent."""

import sys
from pathlib import Path

import pytest

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.prompt_cleaning import clean_prompt
from wan_model.tiny import write_tiny_wan


def test_the_extra_to_install_is_named(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in ("diffusers", "ftfy", "tokenizers"):
        for name in [name for name in sys.modules if name.split(".")[0] == absent]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ValueError, match=r"^the package diffusers.* is absent; run pip install 'wan-model\[tiny\]'$"):
        write_tiny_wan(tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    with pytest.raises(ValueError, match=r"^the package diffusers.* run pip install 'wan-model\[codec\]'$"):
        LatentCodec.from_pretrained(tiny_folder, load_text=False)
    with pytest.raises(
        ValueError, match=r"^the package tokenizers is absent; run pip install 'wan-model\[sampling\]'$"
    ):
        LatentCodec.from_pretrained(tiny_folder, load_vae=False)
    with pytest.raises(ValueError, match=r"^the package ftfy is absent"):
        clean_prompt("a rabbit")
