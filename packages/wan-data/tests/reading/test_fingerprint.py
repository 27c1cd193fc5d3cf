"""What identifies datasets whose shards have equal names, numbers and sizes."""

import hashlib
import shutil
from pathlib import Path

import torch
from latent_shards import write_latent_shards

from wan_data.index.manifest import MANIFEST_NAME
from wan_data.reading.datasets import open_split
from wan_data.reading.fingerprint import digest_without_manifest


def write(folder: Path, value: float) -> Path:
    latents = [torch.full((16, 1, 48, 48), value)] * 2
    write_latent_shards(folder, [("train", latents), ("train", latents), ("val", latents)])
    return folder


def test_shards_without_digests_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 1.0), write(tmp_path / "other", 2.0)
    shutil.copytree(one, tmp_path / "moved")
    assert open_split(one, "train")[0].fingerprint == open_split(other, "train")[0].fingerprint, "a test of nothing"
    assert digest_without_manifest(one) == digest_without_manifest(tmp_path / "moved")
    assert digest_without_manifest(one) != digest_without_manifest(other)


def test_the_digest_is_of_the_beginning_and_the_middle_of_shards(tmp_path: Path) -> None:
    """By formula, because states of runs have it."""
    folder, expected = write(tmp_path / "data", 1.0), hashlib.sha256()
    for shard in sorted(folder.glob("*.tar")):
        content = shard.read_bytes()
        middle = len(content) // 2
        expected.update(content[: 1 << 15] + content[middle : middle + (1 << 15)])
    assert digest_without_manifest(folder) == expected.hexdigest()[:16]


def test_data_with_a_manifest_need_no_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 1.0)
    (folder / MANIFEST_NAME).write_text("{}")
    assert digest_without_manifest(folder) is None
