import contextlib
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys

import pytest

from wan_data.reading.datasets import splits
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import DATASET_YAML, check_metadata, write_metadata
from wan_data.shards.writer import ShardRecord

ENERGON = [sys.executable, "-c", "import sys; from megatron.energon.cli.main import main; sys.exit(main())"]


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def open_it(folder):
    return PackLoader(LoaderConfig(str(folder), capacity=200), rank=0, world_size=1)


def test_the_splits_are_counted(dataset):
    counts = splits(dataset)
    assert sum(counts.values()) == 14
    assert set(counts) == {"train", "val"}
    assert sorted(itertools.chain(*check_metadata(dataset).values())) == sorted(
        path.name for path in dataset.glob("*.tar")
    )


def test_a_dataset_yaml_that_runs_code_is_refused_before_it_runs(copy, tmp_path):
    marker = tmp_path / "marker"
    (copy / ".nv-meta" / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\ndef fn(sample): return sample\n")
    (copy / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        "sample_loader: evil.py:fn\npart_filter: evil.py:fn\n"
    )
    with pytest.raises(ValueError, match=r"dataset.yaml is not what wan-data writes and could run code"):
        open_it(copy)
    assert not marker.exists()
    # The control: Energon itself runs it.
    from megatron.energon import WorkerConfig, get_train_dataset

    get_train_dataset(
        copy,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )
    assert marker.exists()


@pytest.mark.parametrize("name", ["pipe:id.tar", "../x.tar", "s3://bucket/x.tar", "absent.tar", "/etc/x.tar"])
def test_shards_elsewhere_are_refused(copy, name):
    path = copy / ".nv-meta" / ".info.json"
    info = json.loads(path.read_text())
    info["shard_counts"][name] = 1
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"\.info\.json names"):
        open_it(copy)


@pytest.mark.parametrize(
    "text",
    [
        "split_parts: {train: ['../x.tar']}\nexclude: []\n",
        "__module__: os\n__class__: system\n",
        "split_parts: {train: [shard-rank00-000000.tar]}\nexclude: [shard-rank00-000000.tar]\n",
        "split_parts: !!python/object/apply:os.system [id]\n",
        "",
    ],
)
def test_a_split_yaml_of_another_form_is_refused(copy, text):
    (copy / ".nv-meta" / "split.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"split\.yaml"):
        open_it(copy)


def test_what_energon_itself_writes_is_accepted(copy):
    (copy / ".nv-meta" / "split.yaml").write_text(
        "split_parts:\n  train:\n  - shard-rank00-{000000..000003}.tar\n  val: []\n  test:\n"
        "  - shard-rank00-000004.tar\nexclude: []\n"
    )
    assert set(splits(copy)) == {"train", "test"}


def test_a_shard_of_another_length_is_refused(copy):
    shard = copy / "shard-rank00-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-rank00-000001.tar has .* bytes; wan-data.json says"):
        open_it(copy)


def test_missing_things_are_named(tmp_path, copy):
    with pytest.raises(ValueError, match="no folder"):
        open_it(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no \.nv-meta"):
        open_it(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        PackLoader(LoaderConfig(str(copy), capacity=200, split="test"), rank=0, world_size=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info",), "14 samples"),
        (("lint", "--parallel", "0"), ""),
        (("preview", "--split-parts", "val"), "caption (<class 'str'>)"),
    ],
)
def test_energons_own_tools(dataset, arguments, says):
    name, *options = arguments
    command = [*ENERGON, name, str(dataset), *options]
    done = subprocess.run(
        [*command, "--dataset-config", "captioning.yaml"], capture_output=True, text=True, input="y\n" * 20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def rows(folder):
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as index:
        return sorted(index.iterdump())  # Energon inserts them as its workers get ready


def test_a_shard_of_other_samples_than_its_record_is_named(dataset, tmp_path):
    shutil.copy(dataset / "shard-rank00-000000.tar", tmp_path)
    with pytest.raises(OSError, match="it holds 3 samples instead of 2") as caught:
        write_metadata(tmp_path, [ShardRecord("shard-rank00-000000.tar", "train", 2, 0, "")])
    assert caught.value.filename.endswith("shard-rank00-000000.tar")
    assert not (tmp_path / ".nv-meta" / "index.sqlite").exists()


def test_energon_prepare_makes_a_dataset_of_the_same_shards(dataset, tmp_path):
    for shard in dataset.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    command = [*ENERGON, "prepare", str(tmp_path), "--non-interactive"]
    command += ["--split-ratio", "8,1,1", "--sample-type", "CrudeWebdataset", "--force-overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(splits(tmp_path).values()) == 14
    # The index is Energon's own, to the last row.
    assert rows(tmp_path) == rows(dataset)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")} == {
        path.name: path.read_bytes() for path in dataset.glob("*.idx")
    }
    info, ours = (json.loads((folder / ".nv-meta" / ".info.json").read_text()) for folder in (tmp_path, dataset))
    assert info == ours
    assert (tmp_path / ".nv-meta" / "dataset.yaml").read_bytes() == DATASET_YAML
    assert len(next(iter(PackLoader(LoaderConfig(str(tmp_path), capacity=200), rank=0, world_size=1))).keys) > 1
