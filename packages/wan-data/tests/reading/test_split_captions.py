"""Captions of a split by the names that packs have, in the order of the packs."""

from pathlib import Path

import pytest
import torch

from wan_data.reading.captions import captions_of
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.writer import Sample, ShardWriter

BLEND = """
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  val:
    blend:
      - {path: two, weight: 1}
      - {path: one, split_part: train, weight: 3}
"""


def write(folder: Path, splits: list[str]) -> None:
    """A shard of each split, of three samples, the second without a caption."""
    folder.mkdir()
    records = []
    for number, split in enumerate(splits):
        with ShardWriter(folder, number, split) as shard:
            for index in range(3):
                info = {} if index == 1 else {"caption": f"{folder.name} {number} {index} 兔子"}
                shard.write(Sample(f"key{number}{index}", torch.zeros(16, 1, 4, 4), torch.zeros(2, 8), info))
        assert shard.record is not None
        records.append(shard.record)
    write_metadata(folder, records)


@pytest.mark.parametrize("path", ["two", "blend.yaml"])
def test_names_and_order_are_those_of_the_packs(path: str, tmp_path: Path) -> None:
    write(tmp_path / "one", ["train"])
    write(tmp_path / "two", ["val", "train", "val"])
    (tmp_path / "blend.yaml").write_text(BLEND)
    found = list(captions_of(tmp_path / path, "val"))
    config = LoaderConfig(str(tmp_path / path), capacity=4, split="val", text_length=4, packing_buffer=1)
    keys = [key for pack in PackLoader(config, rank=0, world_size=1) for key in pack.keys]
    assert [name for name, _ in found] == keys
    assert len(keys) == (6 if path == "two" else 9)
    assert found[3][1] == "two 2 0 兔子"
    assert found[4][1] == "", "one without a caption"


def test_a_split_that_is_absent_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one", ["train"])
    with pytest.raises(ValueError, match="has no split 'val'"):
        list(captions_of(tmp_path / "one", "val"))
