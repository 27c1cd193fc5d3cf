"""Datasets in a store: their packs, states and errors are those of the same folder on a disk."""

import itertools
import json
import random
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from latent_shards import write_latent_shards
from object_store import Fault

from wan_data.index.manifest import MANIFEST_NAME
from wan_data.inspect.statistics import inspect
from wan_data.reading.captions import captions_of
from wan_data.reading.datasets import open_split, read_latent_spec, splits
from wan_data.reading.empty_caption import read_empty_caption
from wan_data.reading.fingerprint import digest_without_manifest
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards import stored_shards
from wan_data.storage.files import forget_listing
from wan_data.storage.store import read


@pytest.fixture(scope="module")
def many(once):
    """Five shards of 24 training samples each and one of 12 for validation, of 1 to 9 tokens, without a manifest."""

    def write(folder):
        rng = random.Random(0)
        counts = [24, 24, 24, 24, 24, 12]
        latents = [
            [torch.full((16, 1, 2, 2 * rng.randint(1, 9)), 30.0 * n + i) for i in range(count)]
            for n, count in enumerate(counts)
        ]
        write_latent_shards(folder, zip(["train"] * 5 + ["val"], latents, strict=True))

    return once("many-latents", write)


@pytest.fixture
def stored(bucket, many):
    """The same dataset in a bucket: its folder on the server, and its URL."""
    folder, root = bucket
    shutil.copytree(many, folder / "data" / "set")
    return folder / "data" / "set", root / "data/set"


def loader(path, **changes):
    config = {"capacity": 12, "packing_buffer": 7, "text_length": 4, **changes}
    return PackLoader(LoaderConfig(str(path), **config), rank=0, world_size=1)


def drawn(packs, count=None):
    return [(pack.keys, pack.tokens_SC.sum().item(), pack.layout) for pack in itertools.islice(packs, count)]


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2}, {"shuffle_buffer": 20}])
def test_packs_and_states_are_those_of_the_disk(stored, many, changes, monkeypatch):
    if changes.get("shuffle_buffer"):
        monkeypatch.setattr("wan_data.reading.loader._MOST_SEQUENCES", 10)
    on_disk, in_store = loader(many, **changes), loader(stored[1], **changes)
    disk, store = iter(on_disk), iter(in_store)
    for step in range(30):
        assert drawn(disk, 1) == drawn(store, 1), step
        if step % 8 == 5 or step == 29:
            state = json.loads(json.dumps(in_store.state_dict()))
            # That of workers has Python's global generator, from which their queues draw names of files.
            if not changes.get("num_workers"):
                assert state == json.loads(json.dumps(on_disk.state_dict()))
    following = drawn(disk, 20)
    on_disk.close()
    in_store.close()
    resumed = loader(stored[1], **changes)
    resumed.load_state_dict(state)
    assert drawn(resumed, 20) == following, "a run that moves its dataset to a store goes on as before"
    resumed.close()
    back = loader(many, **changes)
    back.load_state_dict(state)
    assert drawn(back, 20) == following
    back.close()


def test_a_split_in_order_and_its_captions_are_those_of_the_disk(stored, many, proxy):
    assert drawn(loader(stored[1], split="val", packing_buffer=1)) == drawn(loader(many, split="val", packing_buffer=1))
    assert list(captions_of(str(stored[1]), "val")) == list(captions_of(many, "val"))
    assert splits(str(stored[1])) == splits(many)
    assert digest_without_manifest(str(stored[1])) == digest_without_manifest(many) is not None


def test_a_prepared_dataset_is_opened_from_a_store(bucket, dataset):
    folder, root = bucket
    shutil.copytree(dataset, folder / "d")
    url = f"{root}/d"
    assert read_latent_spec(url) == read_latent_spec(dataset)
    assert torch.equal(read_empty_caption(url), read_empty_caption(dataset))
    assert [one.fingerprint for one in open_split(url, "train")] == [
        one.fingerprint for one in open_split(dataset, "train")
    ]
    assert inspect(root / "d") == {**inspect(dataset), "path": url}
    assert digest_without_manifest(url) is None
    changes = {"capacity": 60, "text_length": None}
    assert drawn(loader(url, **changes), 10) == drawn(loader(dataset, **changes), 10)


def test_blends_name_datasets_of_stores(bucket, many, stored, tmp_path):
    folder, root = bucket
    text = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
    of = "      - path: {}\n        weight: 1\n"
    (folder / "blends").mkdir()
    shutil.copytree(many, folder / "data" / "other")
    (folder / "blends" / "both.yaml").write_text(text + of.format("../data/set") + of.format("../data/other"))
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copytree(folder / "blends", tmp_path / "blends")
    assert drawn(loader(root / "blends/both.yaml"), 20) == drawn(loader(tmp_path / "blends" / "both.yaml"), 20)
    (tmp_path / "mixed.yaml").write_text(text + of.format(stored[1]) + of.format("data/other"))
    assert splits(tmp_path / "mixed.yaml") == {"train": 240}
    assert len(drawn(loader(tmp_path / "mixed.yaml"), 5)) == 5
    (tmp_path / "twice.yaml").write_text(text + of.format(stored[1]) + of.format(f"{stored[1]}/"))
    with pytest.raises(ValueError, match="is listed twice"):
        splits(tmp_path / "twice.yaml")
    with pytest.raises(ValueError, match=r"none.yaml does not exist"):
        splits(str(root / "none.yaml"))
    with pytest.raises(ValueError, match=r"nothing has no \.nv-meta folder"):
        splits(str(root / "nothing"))


def test_opening_makes_no_request_for_each_shard(stored, proxy):
    one = loader(stored[1])
    opened = len(proxy.requests)
    assert proxy.count("GET", "start-after") == 1
    assert proxy.count("GET|HEAD", r"\.tar") == 0
    loader(stored[1], split="val")
    assert proxy.count("GET", "start-after") == 1, "an unchanged folder is listed once"
    assert len(proxy.requests) < 2 * opened
    proxy.requests.clear()
    drawn(iter(one), 40)
    one.settle()
    assert proxy.count("GET", r"\.idx") <= 5, "the offsets of a shard are read once"
    samples = proxy.count("GET", r"\.tar(\?|$)")
    assert 80 <= samples <= 120, "one request for each sample"
    assert proxy.count("HEAD", "") == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_are_read_side_by_side(stored, many, monkeypatch, split):
    together, count = threading.Barrier(4), itertools.count()

    def waiting(*arguments):
        if next(count) < 4:
            together.wait(60)  # raises if the others do not come
        return read(*arguments)

    monkeypatch.setattr(stored_shards, "read", waiting)
    buffer = 7 if split == "train" else 1
    one, on_disk = (loader(path, split=split, packing_buffer=buffer) for path in (stored[1], many))
    assert drawn(one, 4) == drawn(on_disk, 4)
    one.settle()
    assert not together.broken


def test_a_cache_serves_later_epochs_within_its_bound(stored, many, proxy, tmp_path, monkeypatch):
    def kept():
        return sum(file.stat().st_size for file in tmp_path.rglob("*.part"))

    def samples_read(**changes):
        proxy.requests.clear()
        one = loader(stored[1], **changes)
        assert drawn(one, 40) == wanted
        one.settle()
        return proxy.count("GET", r"\.tar(\?|$)")

    wanted = drawn(loader(many), 40)
    monkeypatch.setenv("WAN_DATA_CACHE", str(tmp_path / "large"))
    assert samples_read(cache_bytes=10**9) > 80
    assert samples_read(cache_bytes=10**9) <= 10, "no more than those that the last time came after the last pack"
    bound = kept() // 3
    for file in tmp_path.rglob("*.part"):
        file.write_bytes(file.read_bytes()[:-1])
    assert samples_read(cache_bytes=10**9) > 80, "a damaged file is not used"
    shutil.rmtree(tmp_path / "large")
    monkeypatch.setenv("WAN_DATA_CACHE", str(tmp_path / "small"))
    assert samples_read(cache_bytes=bound) > 80
    assert bound / 2 < kept() <= bound


def test_a_cache_that_cannot_be_made_is_refused(stored, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("WAN_DATA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="for a cache of what is read from a store, cannot be made"):
        loader(stored[1], cache_bytes=1)
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        loader(stored[1], cache_bytes=-1)


def test_failures_that_pass_change_nothing(stored, many, proxy):
    one = loader(stored[1])
    wanted = drawn(loader(many), 20)
    proxy.faults[:] = [
        Fault("GET", r"\.tar(\?|$)", status=500, times=3),
        Fault("GET", r"\.tar(\?|$)", status=503, times=3),
        Fault("GET", r"\.tar(\?|$)", cut=700, times=3),
        Fault("GET", r"\.idx", status=503, times=1),
    ]
    assert drawn(one, 20) == wanted
    assert [fault.times for fault in proxy.faults] == [0, 0, 0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_that_stays_is_one_sentence_that_names_the_shard(stored, proxy, workers, monkeypatch):
    folder, root = stored
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "1")
    for fault, what in (
        (
            Fault("GET", r"\.tar(\?|$)", status=503, times=10**6),
            "reading failed [0-9]+ times in [0-9]+ s: it answered 503",
        ),
        (Fault("GET", r"\.tar(\?|$)", status=403, times=10**6), "reading was denied"),
    ):
        proxy.faults[:] = [fault]
        with pytest.raises(ValueError, match=what) as error:
            drawn(loader(root, num_workers=workers), 40)
        assert str(error.value).startswith(f"shard {root}/shard-rank00-00000")
        assert "\n" not in str(error.value)
    proxy.faults.clear()
    one = loader(root, num_workers=workers)
    (folder / "shard-rank00-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"^shard .*-000003\.tar cannot be read: it does not exist$") as error:
        drawn(one, 80)


def test_a_shard_that_was_replaced_is_refused(stored, many, monkeypatch):
    folder, root = stored
    one = loader(root)
    replaced = folder / "shard-rank00-000001.tar"
    # Of the same size, from the middle of a sample on, as another shard's.
    other = (folder / "shard-rank00-000000.tar").read_bytes()
    replaced.write_bytes((other * 2)[: replaced.stat().st_size])
    with pytest.raises(ValueError, match=r"shard .*-000001\.tar was replaced while the dataset was read"):
        drawn(one, 80)
    monkeypatch.setattr(stored_shards, "_LOOK_AFTER", 0.0)
    shutil.copyfile(many / replaced.name, replaced)
    two = loader(root)
    drawn(two, 2)
    shutil.copyfile(many / "shard-rank00-000002.tar", replaced)
    with pytest.raises(ValueError, match=r"shard .*-000001\.tar was replaced while the dataset was read"):
        drawn(two, 80)


def test_an_incomplete_copy_is_refused_at_opening(stored, dataset, bucket):
    folder, root = stored
    (folder / "shard-rank00-000002.tar.idx").unlink()
    with pytest.raises(ValueError, match=r"000002\.tar\.idx is missing"):
        loader(root)
    (folder / "shard-rank00-000002.tar").unlink()
    forget_listing(root)
    with pytest.raises(ValueError, match=r"names shard-rank00-000002\.tar, which is missing from s3://"):
        loader(root)
    shutil.copytree(dataset, bucket[0] / "d")
    shard = next((bucket[0] / "d").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=rf"s3://.*/{shard.name} has [0-9]+ bytes; {MANIFEST_NAME} says"):
        loader(bucket[1] / "d", capacity=60, text_length=None)
    (bucket[0] / "d" / MANIFEST_NAME).write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list; expected an object"):
        read_latent_spec(str(bucket[1] / "d"))


LEFT = """
import sys
from wan_data.reading.loader import LoaderConfig, PackLoader
loaders = [
    PackLoader(LoaderConfig(sys.argv[1], 12, packing_buffer=60, text_length=4, seed=seed), rank=0, world_size=1)
    for seed in range(4)
]
print([len(next(iter(one)).keys) > 0 for one in loaders])
"""


def test_a_process_ends_as_it_is_while_samples_are_read_ahead(stored, length):
    for _ in range(length(10, 1)):
        done = subprocess.run(
            [sys.executable, "-c", LEFT, str(stored[1])], capture_output=True, text=True, check=False, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "[True, True, True, True]\n"
