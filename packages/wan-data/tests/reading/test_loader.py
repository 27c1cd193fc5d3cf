import dataclasses
import io
import itertools
import json
import multiprocessing
import random
import re
import shutil
import tarfile

import pytest
import torch
from latent_shards import write_latent_shards
from safetensors.torch import load_file, save_file

from wan_data.energon.worker_processes import WorkerContext
from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.reading.datasets import read_latent_spec, splits
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.writer import ShardRecord
from wan_model.codec.latent_codec import LatentCodec

CAPACITY = 60  # the samples have 9 to 18 tokens


def loader(folder, rank=0, world_size=1, **changes):
    config = LoaderConfig(str(folder), **{"capacity": CAPACITY, "pad_multiple": 4, "packing_buffer": 8, **changes})
    return PackLoader(config, rank=rank, world_size=world_size)


def drawn(packs, count):
    # The keys and the values: a pack of the right names with other content must not pass.
    return [(pack.keys, pack.tokens_SC.sum().item(), pack.layout) for pack in itertools.islice(packs, count)]


def keys_of(packs, count):
    return [key for pack in itertools.islice(packs, count) for key in pack.keys]


def write_mixed_sizes(folder):
    """90 training samples and 60 validation samples of 1 to 9 tokens, which packs of 12 tokens hold badly."""
    rng = random.Random(0)
    splits = ("train", "train", "train", "val", "val")
    latents = [[torch.full((16, 1, 2, 2 * rng.randint(1, 9)), 30.0 * n + i) for i in range(30)] for n in range(5)]
    write_latent_shards(folder, zip(splits, latents, strict=True))


@pytest.fixture(scope="session")
def mixed_sizes(once):
    return once("mixed-sizes", write_mixed_sizes)


def mixed(folder, **changes):
    return loader(folder, **{"capacity": 12, "packing_buffer": 7, "text_length": 4, **changes})


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


@pytest.mark.parametrize("order", ["single samples", "sequences and a shuffle buffer"])
def test_resume_is_exact_from_every_pack_of_an_epoch(mixed_sizes, order, monkeypatch):
    changes = {}
    if order != "single samples":
        monkeypatch.setattr("wan_data.reading.loader._MOST_SEQUENCES", 10)
        changes = {"shuffle_buffer": 20}
    whole, states, wanted, carried = mixed(mixed_sizes, **changes), [], [], set()
    packs = iter(whole)
    # Beyond the end of the first epoch.
    while sum(len(keys) for keys, *_ in wanted) < 100:
        states.append(json.loads(json.dumps(whole.state_dict())))
        carried.update(re.findall(r'"_carried": (\d+)', json.dumps(states[-1])))
        wanted += drawn(packs, 1)
    assert len(states) > 40
    following = 12  # packs: more than a buffer
    wanted += drawn(packs, following)
    for step in range(0, len(states), 3 if changes else 1):
        state = states[step]
        resumed = mixed(mixed_sizes, **changes)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert drawn(resumed, following) == wanted[step : step + following], step
    # The controls: samples are carried over at many of the points, and a loader without a state begins anew.
    assert {"0", "1", "2"} <= carried
    assert drawn(mixed(mixed_sizes, **changes), following) != wanted[5 : 5 + following]


def as_energon_6_0_1(monkeypatch):
    """Energon's worker numbers and its memory after a resume as those of 6.0.1, which are no use to resume exactly."""
    from megatron.energon import SavableDataLoader, WorkerConfig

    def number(self):
        process = torch.utils.data.get_worker_info()
        return (process.id + process.num_workers - self.worker_id_offset) % process.num_workers if process else 0

    restore, save = SavableDataLoader.restore_state_rank, SavableDataLoader.save_state_rank

    def forget(self, state):
        restore(self, state)
        self._worker_sample_counters, self._next_worker_id = [-1] * self.num_workers, 0

    def none_before_the_start(self):
        started = any(getattr(self, name, None) for name in ("_epoch_iterator", "_persistent_iterator"))
        return save(self) if started else None

    monkeypatch.setattr(WorkerConfig, "rank_worker_id", number)
    monkeypatch.setattr(SavableDataLoader, "restore_state_rank", forget)
    monkeypatch.setattr(SavableDataLoader, "save_state_rank", none_before_the_start)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
@pytest.mark.parametrize("energon", ["as installed", "as 6.0.1"])
def test_resume_with_workers_is_exact_and_can_be_repeated(mixed_sizes, energon, monkeypatch):
    if energon == "as 6.0.1":
        as_energon_6_0_1(monkeypatch)
    # Three workers, because with two it is always the other one's turn. The second resume comes after a single pack: a
    # worker that has not been asked since the first keeps its position.
    whole = mixed(mixed_sizes, num_workers=3)
    packs = iter(whole)
    wanted = drawn(packs, 7)
    state = json.loads(json.dumps(whole.state_dict()))
    wanted += drawn(packs, 14)
    first = mixed(mixed_sizes, num_workers=3)
    first.load_state_dict(state)
    assert first.state_dict() == state
    assert drawn(iter(first), 1) == wanted[7:8]
    second = mixed(mixed_sizes, num_workers=3)
    second.load_state_dict(first.state_dict())
    assert drawn(second, 13) == wanted[8:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
@pytest.mark.parametrize(("workers", "energon"), [(0, "as installed"), (3, "as installed"), (3, "as 6.0.1")])
def test_a_position_is_the_state_of_before_a_pack_is_drawn_ahead(mixed_sizes, workers, energon, monkeypatch):
    if energon == "as 6.0.1":
        as_energon_6_0_1(monkeypatch)
    whole, plain = mixed(mixed_sizes, num_workers=workers), mixed(mixed_sizes, num_workers=workers)
    packs, plain_packs = iter(whole), iter(plain)
    for consumed in range(20):
        position = whole.position()
        state = plain.state_dict()
        next(packs)  # ahead
        assert position() == state, consumed
        assert position() == state, "asked twice"
        next(plain_packs)
        if consumed == 10:  # and from a position after a resume
            resumed = mixed(mixed_sizes, num_workers=workers)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            following = drawn(iter(resumed), 6)
            position = resumed.position()
            following += drawn(iter(resumed), 1)
            again = mixed(mixed_sizes, num_workers=workers)
            again.load_state_dict(position())
            following = following[:6] + drawn(again, 3)
    assert following == drawn(mixed(mixed_sizes, num_workers=workers), 19)[10:]
    whole.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        whole.position()


def test_the_names_in_a_saved_state_are_those_of_the_first_release(mixed_sizes):
    # Checkpoints hold states: another name of a class or a field would make them useless.
    text = json.dumps(mixed(mixed_sizes).state_dict())
    for name in ('"_CarryingPackingDataset"', '"_carried"', '"carry"', '"packing_buffer"', '"$flex"', '"$state"'):
        assert name in text


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


def test_another_parallel_layout_continues_with_the_same_samples(mixed_sizes):
    """Packs are padded to another multiple, which changes no pack as long as samples have the same capacity."""
    whole = mixed(mixed_sizes, pad_multiple=1)
    wanted = drawn(whole, 40)
    for multiple in (4, 6):
        first = mixed(mixed_sizes, pad_multiple=1)
        assert drawn(first, 15) == wanted[:15]
        second = mixed(mixed_sizes, pad_multiple=multiple)
        second.load_state_dict(first.state_dict())
        rest = list(itertools.islice(second, 25))
        assert [(pack.keys, pack.layout.grids) for pack in rest] == [
            (keys, kept.grids) for keys, _, kept in wanted[15:]
        ]
        assert all(pack.layout.total % multiple == 0 for pack in rest)
        assert any(pack.layout.total > pack.layout.valid for pack in rest)
    with pytest.raises(ValueError, match="of another run: pad_multiple 1 instead of 5"):
        mixed(mixed_sizes, pad_multiple=5).load_state_dict(first.state_dict())


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
    assert read_latent_spec(dataset) == dataclasses.replace(codec.spec, fps="16")
    with pytest.raises(ValueError, match=r"no \.nv-meta"):
        read_latent_spec(tmp_path)
    # Shards of others do not say; with the model named, it is its space, which must then be that of all that say.
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=r"no wan-data\.json, and so does not say which model"):
        read_latent_spec(bare)
    assert read_latent_spec(bare, encoded_by=str(tiny_model)) == codec.spec
    # The manifest alone says to how many tokens captions were cut, which does not make it another model.
    cut = shutil.copytree(dataset, tmp_path / "cut")
    manifest = json.loads((cut / MANIFEST_NAME).read_text())
    manifest["latent_spec"]["text_length"] = 16
    (cut / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert read_latent_spec(cut, encoded_by=str(tiny_model)).text_length == 16
    # Another text encoder is another latent space.
    other = shutil.copytree(tiny_model, tmp_path / "other", ignore=shutil.ignore_patterns("transformer"))
    weights = other / "text_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="different latent spaces: model_id"):
        read_latent_spec(dataset, encoded_by=str(other))


def rewritten(dataset, folder, **spec):
    """A copy whose manifest says something else of the latent space; its samples do not say."""
    copy = shutil.copytree(dataset, folder)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["latent_spec"] |= spec
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    return copy


def test_texts_are_padded_to_what_the_captions_were_cut_to(dataset, tiny_model, tmp_path):
    short = rewritten(dataset, tmp_path / "short", text_length=16)
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / MANIFEST_NAME).unlink()
    for folder, given, wanted in ((dataset, None, 512), (short, None, 16), (bare, None, 512), (short, 32, 32)):
        config = LoaderConfig(str(folder), capacity=CAPACITY, text_length=given)
        assert PackLoader(config, rank=0, world_size=1).state_dict()["text_length"] == wanted
    packs = iter(PackLoader(LoaderConfig(str(bare), capacity=CAPACITY, text_length=None), rank=0, world_size=1))
    assert next(packs).text_BTD.shape[1] == 512
    with pytest.raises(ValueError, match="text_length is 0; it must be at least 1"):
        loader(dataset, capacity=CAPACITY, text_length=0)
    # The model that encoded them does not say what captions were cut to.
    assert read_latent_spec(short, encoded_by=str(tiny_model)).text_length == 16
    assert read_latent_spec(bare, encoded_by=str(tiny_model)).text_length == 512


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
    latents = [torch.full((16, 1, 2, 2), float("nan") if number == 2 else 0.0) for number in range(4)]
    write_latent_shards(tmp_path, [("train", latents)])
    with pytest.raises(
        ValueError, match=r"shard .*shard-rank00-000000.*, sample key0002: member key0002.pth is refused: .*not finite"
    ):
        drawn(loader(tmp_path, num_workers=workers), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_a_split_has_each_sample_once_although_some_are_carried_over(mixed_sizes, workers):
    one = mixed(mixed_sizes, split="val", num_workers=workers)
    for _ in range(2):
        assert sorted(key for pack in one for key in pack.keys) == [f"key{n}{i:03d}" for n in (3, 4) for i in range(30)]


@pytest.mark.parametrize("how", ["deleted", "closed", "left in the middle of a pass"])
def test_workers_end_when_told(mixed_sizes, how):
    before = set(multiprocessing.active_children())
    split = "val" if how.startswith("left") else "train"
    one = mixed(mixed_sizes, split=split, num_workers=2)
    packs = iter(one)
    next(packs)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    assert {type(worker) for worker in workers} == {WorkerContext.Process}
    if how == "deleted":
        del one, packs
    elif how == "closed":
        one.close()
    else:
        del packs
    # torch terminates workers that it cannot reach after five seconds each.
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_says_so(mixed_sizes, workers):
    one = mixed(mixed_sizes, num_workers=workers)
    next(iter(one))
    one.close()
    one.close()
    for use in (iter, PackLoader.state_dict):
        with pytest.raises(ValueError, match="the loader is closed; make a new one"):
            use(one)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_loader_has_a_state_and_no_packs(mixed_sizes, workers, monkeypatch):
    one = mixed(mixed_sizes, num_workers=workers)
    packs = iter(one)
    wanted = drawn(packs, 3)

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.utils.data.dataloader._BaseDataLoaderIter.__next__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(packs)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the loader's iterator was ended by an error"):
        iter(one)
    resumed = mixed(mixed_sizes, num_workers=workers)
    resumed.load_state_dict(one.state_dict())
    assert drawn(resumed, 4) == drawn(mixed(mixed_sizes, num_workers=workers), 7)[3:]
    assert wanted


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
