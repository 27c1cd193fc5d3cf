"""Counts of a prepared dataset, read from its shards and not from the manifest."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.failure import require

PARTS = {"json", "pickle", "pth"}


@dataclass(frozen=True)
class DatasetFacts:
    """Counts of a dataset.

    Attributes:
        shards: tar files.
        samples: in all of them.
        shapes: how many samples have a latent of each shape, as "frames x rows x columns".
        captions: the distinct captions in the side-information.
    """

    shards: int
    samples: int
    shapes: dict[str, int]
    captions: frozenset[str]

    def summary(self) -> dict[str, Any]:
        """For the report: the same, with the number of captions."""
        return {**asdict(self), "captions": len(self.captions)}


def _captions(value: Any) -> list[str]:
    return [text for key, text in value.items() if "caption" in key and isinstance(text, str)]


def read_dataset(folder: Path) -> DatasetFacts:
    """Read every sample of every shard.

    Raises:
        ToolFailure: no shards, no Energon metadata, or a sample without one of its three files.
    """
    shards = sorted(folder.glob("*.tar"))
    require(bool(shards), f"{folder} holds no shards (*.tar)")
    require(
        (folder / ".nv-meta" / "dataset.yaml").is_file(), f"{folder} holds no Energon metadata (.nv-meta/dataset.yaml)"
    )

    shapes: Counter[str] = Counter()
    captions: set[str] = set()
    for shard in shards:
        parts: dict[str, set[str]] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, part = member.name.partition(".")
                parts.setdefault(key, set()).add(part)
                file = archive.extractfile(member)
                require(file is not None, f"{shard} holds {member.name}, which is not a file")
                assert file is not None
                if part == "pth":
                    latent = torch.load(io.BytesIO(file.read()), weights_only=True)
                    shapes[" x ".join(str(size) for size in latent.shape[-3:])] += 1
                elif part == "json":
                    captions.update(_captions(json.load(file)))
        wrong = sorted(key for key, found in parts.items() if found != PARTS)
        require(not wrong, f"{shard}: the samples {wrong} do not have exactly the files {sorted(PARTS)}")
    return DatasetFacts(len(shards), sum(shapes.values()), dict(sorted(shapes.items())), frozenset(captions))
