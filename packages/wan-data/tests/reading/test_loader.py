import io
import itertools
import json
import random
import shutil
import tarfile

import pytest
import torch

from wan_data.reading.datasets import read_latent_spec, splits
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.manifest import MANIFEST_NAME, read_manifest
from wan_data.shards.writer import Sample, ShardWriter
from wan_model.codec.latent_codec import LatentCodec
from wan_model.tiny import write_tiny_wan

CAPACITY = 60  # the samples have 9 to 18 tokens


def loader(folder, rank=0, world_size=1, **changes):
    config = LoaderConfig(str(folder), **{"capacity": CAPACITY, "pad_multiple": 4, "packing_buffer": 8, **changes})
    return PackLoader(config, rank=rank, world_size=world_size)


def drawn(packs, count):
    # The keys and the values: a pack of the right names with other content must not pass.
    return [(pack.keys, pack.tokens_SC.sum().item(), pack.layout) for pack in itertools.islice(packs, count)]


def keys_of(packs, count):
    return [key for pack in itertools.islice(packs, count) for key in pack.keys]


def test_packs_hold_what_the_shards_hold(dataset):
    latents = {}
    for shard in dataset.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".pth"):
                    latents[member.name.removesuffix(".pth")] = torch.load(io.BytesIO(tar.extractfile(member).read()))
    from wan_model.pack import unpatchify

    for pack in itertools.islice(loader(dataset), 6):
        assert pack.layout.total <= CAPACITY
        assert pack.layout.total % 4 == 0
        assert pack.text_BTD.shape[1:] == (512, 32)
        for number, (key, grid) in enumerate(zip(pack.keys, pack.layout.grids, strict=True)):
            rows = pack.tokens_SC[pack.layout.offsets[number] : pack.layout.offsets[number + 1]]
            assert torch.equal(unpatchify(rows, grid), latents[key])


def test_every_sample_once_an_epoch_in_an_order_that_changes(dataset):
    train = splits(dataset)["train"]
    keys = []
    for pack in loader(dataset, packing_buffer=64):
        keys += pack.keys
        if len(keys) >= 2 * train:
            break
    first, second = keys[:train], keys[train : 2 * train]
    assert len(set(first)) == train
    assert set(first) == set(second)
    assert first != second


def test_the_seed_decides_the_order(dataset):
    same = [drawn(loader(dataset), 8) for _ in range(2)]
    assert same[0] == same[1]
    assert drawn(loader(dataset, seed=7), 8) != same[0]


def test_the_global_generator_is_left_alone(dataset):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn(loader(dataset), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_out_an_epoch(dataset):
    parts = [set(keys_of(loader(dataset, rank, 2), 12)) for rank in range(2)]
    assert parts[0]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == splits(dataset)["train"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_from_every_pack(dataset, workers):
    whole = loader(dataset, num_workers=workers)
    packs, states, wanted = iter(whole), [], []
    for _ in range(5):
        states.append(json.loads(json.dumps(whole.state_dict())))
        wanted += drawn(packs, 1)
    wanted += drawn(packs, 3)
    # Energon's worker processes take seconds to end, so one step must do for them.
    for step in (0, 1, 2, 3, 4) if workers == 0 else (3,):
        resumed = loader(dataset, num_workers=workers)
        resumed.load_state_dict(states[step])
        assert resumed.state_dict() == states[step]
        assert drawn(resumed, 8 - step) == wanted[step:]
    # The control: without the state, the packs are those of the beginning.
    if workers == 0:
        assert drawn(loader(dataset), 3) != wanted[4:7]


def test_a_resumed_run_is_resumed_again(dataset):
    # One pack at a time, each in a new loader: workers that have not spoken since the last resume keep their place.
    wanted = drawn(loader(dataset, num_workers=2), 3)
    state, got = None, []
    for _ in range(3):
        one = loader(dataset, num_workers=2)
        if state is not None:
            one.load_state_dict(state)
        got += drawn(iter(one), 1)
        state = one.state_dict()
    assert got == wanted


def test_states_of_another_place_are_refused_by_name(dataset):
    state = loader(dataset).state_dict()
    for other, message in (
        (loader(dataset, 0, 2), "world_size 1 instead of 2"),
        (loader(dataset, seed=5), "seed 1234 instead of 5"),
        (loader(dataset, capacity=64), "capacity 60 instead of 64"),
        (loader(dataset, num_workers=2), "num_workers 0 instead of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="has no state"):
        loader(dataset).load_state_dict({key: value for key, value in state.items() if key != "state"})
    with pytest.raises(ValueError, match="cannot hold a Exploit"):
        loader(dataset).load_state_dict({**state, "state": {"$state": ["Exploit", {}]}})
    with pytest.raises(ValueError, match="damaged"):
        loader(dataset).load_state_dict({**state, "state": 3})
    started = loader(dataset)
    drawn(started, 1)
    with pytest.raises(ValueError, match="before its iteration starts"):
        started.load_state_dict(state)


def test_validation_is_one_pass_in_order(dataset):
    val = loader(dataset, split="val")
    first = [key for pack in val for key in pack.keys]
    assert len(first) == len(set(first)) == splits(dataset)["val"]
    assert [key for pack in val for key in pack.keys] == first
    assert not set(first) & set(keys_of(loader(dataset), 10))
    with pytest.raises(ValueError, match="each iteration is a whole pass"):
        val.state_dict()


def test_the_latent_space_comes_from_the_dataset(dataset, tiny_model, tmp_path):
    codec = LatentCodec.from_pretrained(tiny_model, load_vae=False, load_text=False)
    assert read_latent_spec(dataset) == codec.spec
    with pytest.raises(ValueError, match=r"no \.nv-meta"):
        read_latent_spec(tmp_path)
    # Shards of others do not say; with the model named, it is its space, which must then be that of all that say.
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=r"no wan-data\.json, and so does not say which model"):
        read_latent_spec(bare)
    assert read_latent_spec(bare, encoded_by=str(tiny_model)) == codec.spec
    write_tiny_wan(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="different latent spaces: model_id"):
        read_latent_spec(dataset, encoded_by=str(tmp_path / "other"))


def test_samples_too_large_for_a_pack_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"samples of .* tokens each, and a pack holds 12: raise the capacity"):
        loader(dataset, capacity=15)
    # Shards of others have no manifest: the sample itself is named.
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / MANIFEST_NAME).unlink()
    with pytest.raises(
        ValueError, match=r"shard .*/bare/shard-rank00-\d+.tar, sample \w+: its \d+ tokens do not fit a pack of 12"
    ):
        drawn(loader(bare, capacity=15), 20)


def test_too_few_samples_for_the_ranks_are_refused(dataset):
    with pytest.raises(ValueError, match="training samples for 20 ranks of 2 workers"):
        loader(dataset, 0, 20, num_workers=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_sample_ends_the_run_and_is_named(tmp_path, workers):
    with ShardWriter(tmp_path, 0, "train") as shard:
        for number in range(4):
            latent = torch.full((16, 1, 2, 2), float("nan") if number == 2 else 0.0)
            shard.write(Sample(f"key{number}", latent, torch.zeros(3, 8), {"caption": "x"}))
    write_metadata(tmp_path, [shard.record])
    with pytest.raises(
        ValueError, match=r"shard .*shard-rank00-000000.*, sample key2: member key2.pth is refused: .*not finite"
    ):
        drawn(loader(tmp_path, num_workers=workers), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_a_split_has_each_sample_once_although_some_wait(tmp_path, workers):
    rng, records = random.Random(0), []
    for number, split in enumerate(("train", "val", "val")):
        with ShardWriter(tmp_path, number, split) as shard:
            for i in range(30):
                latent = torch.zeros(16, 1, 2, 2 * rng.randint(1, 9))
                shard.write(Sample(f"key{number}{i:02d}", latent, torch.zeros(3, 8), {"caption": "x"}))
        records.append(shard.record)
    write_metadata(tmp_path, records)
    one = loader(tmp_path, split="val", capacity=12, packing_buffer=7, num_workers=workers)
    for _ in range(2):
        assert sorted(key for pack in one for key in pack.keys) == [f"key{n}{i:02d}" for n in (1, 2) for i in range(30)]


def test_a_shard_of_the_recipe_is_read(tmp_path):
    # As NVIDIA's script writes them: stock pickle, bfloat16, no fields of ours, no manifest.
    import pickle

    def add(tar, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    with tarfile.open(tmp_path / "shard-rank00-000000.tar", "w") as tar:
        for number in range(3):
            out = io.BytesIO()
            torch.save(torch.full((16, 2, 4, 4), float(number), dtype=torch.bfloat16), out)
            add(tar, f"{number:06d}.json", json.dumps({"caption": "x", "processed_frames": 5}).encode())
            add(tar, f"{number:06d}.pickle", pickle.dumps(torch.ones(7, 32, dtype=torch.bfloat16)))
            add(tar, f"{number:06d}.pth", out.getvalue())
    from wan_data.shards.writer import ShardRecord

    write_metadata(tmp_path, [ShardRecord("shard-rank00-000000.tar", "train", 3, 0, "")])
    pack = next(iter(loader(tmp_path)))
    assert pack.tokens_SC.dtype == torch.float32
    assert set(pack.keys) <= {"000000", "000001", "000002"}
    assert pack.text_BTD[0].sum() == 7 * 32


def test_a_latent_of_another_space_is_refused(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["latent_spec"]["model_id"] = "another"
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert read_manifest(copy).latent_spec.model_id == "another"
    with pytest.raises(ValueError, match="its latent is of the space"):
        drawn(loader(copy), 1)
