"""Preparations that are killed, lack disk space or compete; ``nox -s soak`` runs these at full length."""

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from dataset_sources import records_of
from latent_shards import write_latent_shards

from wan_data.inspect.verify import verify
from wan_data.prepare.settings import PrepareSettings
from wan_data.reading.loader import LoaderConfig, PackLoader

PROGRAM = Path(__file__).with_name("reliability_runs.py")


@pytest.fixture(scope="session")
def reliability_runs(once, clips, tiny_model, length):
    """What one process saw of all three, which imports and loads the model once."""
    counts = {"kills": length(200, 12), "full_disk": length(20, 6), "races": length(20, 4)}

    def build(path):
        work = path.with_suffix(".work")
        # Three of the six clips make several shards and both splits too.
        few = shutil.ignore_patterns("deep", "*[23].v1*")
        shutil.copytree(clips, work / "clips", ignore=length(None, few))
        (work / "runs").mkdir()
        command = [sys.executable, str(PROGRAM), work / "clips", work / "runs", tiny_model, json.dumps(counts)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout.splitlines()[-1])

    seen = json.loads(once("reliability-runs", build).read_text())

    def get(what):
        assert "error" not in seen[what], seen[what]["error"]
        return seen[what]

    return get


def test_killed_at_any_moment_it_ends_with_the_same_bytes(reliability_runs, length):
    found = reliability_runs("kills")
    print(found)
    assert found["killed"] >= length(200, 12)
    assert found["finished"] >= 1
    assert (found["half_shards"], found["different"]) == (0, 0)


def test_a_full_disk_is_named_and_a_rerun_succeeds(reliability_runs):
    found = reliability_runs("full_disk")
    print(found)
    failed = 0
    for limit, code, said, again, same in found["runs"]:
        assert code in (0, 1), f"{limit}: {said}"
        assert (again, same) == (0, True)
        if code:
            failed += 1
            path, _, sentence = said.partition(" | ")
            assert "/run" in path, f"{limit}: {said}"
            assert "File too large" in sentence or "cannot be written" in sentence, said
    assert failed >= len(found["runs"]) / 2


def test_two_writers_one_wins(reliability_runs):
    found = reliability_runs("races")
    print(found)
    lost = 0
    for codes, said, same in found["runs"]:
        assert same
        assert 0 in codes
        for code, sentence in zip(codes, said, strict=True):
            if code:
                lost += 1
                assert code == 1
                assert "is being written by" in sentence
    assert lost >= 1


# -- broken videos ----------------------------------------------------------------------------------------------------


# A Matroska name for the whole mp4, and changes that leave what FFmpeg 8 decodes as it was: of every 560 broken videos.
HARMLESS = {"wrong.mkv", "fuzzed262.mp4", "fuzzed306.mp4", "fuzzed320.mp4"}


def crafted(folder, whole):
    """Sixty files that are not what they seem."""
    size = len(whole)
    files = {f"cut{i:02d}.mp4": whole[: size * i // 20] for i in range(20)}
    files |= {f"head{i}.mp4": whole[size * (i + 1) // 12 :] for i in range(10)}
    files |= {
        f"zeros{i}.mp4": whole[: size * i // 10] + bytes(size // 10) + whole[size * (i + 1) // 10 :] for i in range(10)
    }
    files |= {f"twice{i}.mp4": whole[: size * i // 5] + whole for i in range(1, 5)}
    files |= {
        "text.mp4": b"a text",
        "empty.mkv": b"",
        "newline.avi": b"\n",
        "riff.avi": b"RIFF\xff\xff\xff\x7fAVI LIST",
    }
    files |= {"gif.gif": b"GIF89a\xff\xff\xff\xff\x80\x00\x00", "ebml.webm": b"\x1aE\xdf\xa3" + bytes(range(256))}
    files |= {"png.mp4": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00"}
    files |= {
        "list.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "m3u.ts": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    }
    files |= {"wrong.mkv": whole, "jpeg.mov": b"\xff\xd8\xff\xe0" + bytes(64)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nowhere")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    return len(files) + 4


def fuzzed(folder, whole, count):
    """One to twenty bytes changed, moved or lost, anywhere."""
    rng = random.Random(1)
    for number in range(count):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            place, length = rng.randrange(len(data)), rng.randint(1, 8)
            kind = rng.randrange(3)
            if kind == 0:
                data[place] = rng.randrange(256)
            elif kind == 1:
                del data[place : place + length]
            else:
                data[place:place] = rng.randbytes(length)
        (folder / f"fuzzed{number:03d}.mp4").write_bytes(data)


def captions(folder, count):
    """Captions of all kinds of wrongness, each beside a clip that is good."""
    rng = random.Random(2)
    good = '{"caption": "größer"}'.encode()
    for number in range(count):
        data = bytearray(good)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / f"caption{number:03d}.json").write_bytes(data)


def test_every_broken_video_is_named_and_the_good_ones_are_untouched(
    prepared, clip, tiny_model, silent, length, tmp_path
):
    good, mixed = tmp_path / "good", tmp_path / "mixed"
    for number in range(4):
        clip(good / f"good{number}.mkv", range(40 * number, 40 * number + 12), size=(32, 48))
        (good / f"good{number}.txt").write_text(f"Clip {number}.")
    shutil.copytree(good, mixed)
    rng = np.random.default_rng(0)
    source = write_mpeg4(tmp_path / "source.mp4", rng.integers(0, 256, (12, 32, 48, 3), np.uint8))
    count = crafted(mixed, source.read_bytes())
    fuzz, said = length(500, 30), length(200, 20)
    fuzzed(mixed, source.read_bytes(), fuzz)
    captions(mixed, said)
    for path in mixed.iterdir():
        if (
            path.suffix in (".mp4", ".avi", ".gif", ".webm", ".ts", ".mov", ".mkv")
            and not path.with_suffix(".txt").exists()
        ):
            path.with_suffix(".txt").write_text("A clip.")
    for number in range(said):
        shutil.copy(good / "good0.mkv", mixed / f"caption{number:03d}.mkv")
    settings = PrepareSettings(areas=(32 * 48,), frames=9, min_frames=5, validation_fraction=0)
    clean = prepared(good, tmp_path / "clean", tiny_model, settings)
    manifest = prepared(mixed, tmp_path / "out", tiny_model, settings, decoders=2, report=silent)

    verdicts = {record.path: record for record in records_of(tmp_path / "out")}
    assert len(verdicts) == 4 + count + fuzz + said
    assert all(bool(record.reason) == (record.verdict == "rejected") for record in verdicts.values())
    assert sum(record.samples for record in verdicts.values()) == sum(manifest.samples.values())
    assert all(record.verdict == "accepted" for name, record in verdicts.items() if name.startswith("good"))
    for name in ("text.mp4", "pipe.mp4", "dangling.mp4", "loop.mp4", "zero.mp4", "list.mp4", "m3u.ts", "cut05.mp4"):
        assert verdicts[name].verdict == "rejected", name
    rejected = sum(record.verdict == "rejected" for record in verdicts.values())
    print({"inputs": len(verdicts), "rejected": rejected, "processed": len(verdicts) - rejected})
    accepted = {name for name, record in verdicts.items() if record.verdict == "accepted"}
    assert {name for name in accepted if not name.startswith(("good", "caption"))} <= HARMLESS

    def members(folder):
        found = {}
        for shard in folder.glob("*.tar"):
            with tarfile.open(shard) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}
        return found

    wanted, found = members(tmp_path / "clean"), members(tmp_path / "out")
    assert sum(clean.samples.values()) == 4
    assert {name: found.get(name) for name in wanted} == wanted


def write_mpeg4(path, images):
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


# -- damaged shards ---------------------------------------------------------------------------------------------------


def test_every_cut_and_every_flipped_bit_is_found(dataset, length, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    rng = random.Random(0)
    shards = sorted(copy.glob("*.tar"))

    def found(shard, data):
        whole = shard.read_bytes()
        shard.write_bytes(data(bytearray(whole)))
        _, problems = verify(copy)
        shard.write_bytes(whole)
        return any(shard.name in problem and "damaged" in problem for problem in problems)

    def flip(data):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    cuts = [found(rng.choice(shards), lambda data: data[: rng.randrange(len(data))]) for _ in range(length(300, 10))]
    flips = [found(rng.choice(shards), flip) for _ in range(length(400, 10))]
    print({"cuts": len(cuts), "found": sum(cuts), "flips": len(flips), "flips found": sum(flips)})
    assert all(cuts)
    assert all(flips)
    assert verify(copy)[1] == []


# -- long reading -----------------------------------------------------------------------------------------------------


def resident(pids):
    return sum(
        int(line.split()[1]) * 1024
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )


def children():
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


# Four readers on two cores, which torch advises against; here their number matters and their speed does not.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_each_sample_once_an_epoch_and_memory_stays_flat(length, tmp_path):
    count, workers, epochs, a_shard = length(10_000, 400), 4, 3, 100
    latents = [torch.zeros(16, 1, 2, 2)] * a_shard
    write_latent_shards(tmp_path, [("train", latents)] * (count // a_shard), text_tokens=2)
    share = count // workers
    config = LoaderConfig(str(tmp_path), capacity=8, packing_buffer=20, num_workers=workers, text_length=2)
    loader = iter(PackLoader(config, rank=0, world_size=1))
    streams = [[] for _ in range(workers)]
    memory = []
    for number, pack in enumerate(loader):
        # torch's loader asks its workers in turn.
        streams[number % workers].extend(pack.keys)
        drawn = sum(map(len, streams))
        if drawn >= (len(memory) + 1) * count:
            memory.append(resident([os.getpid(), *children()]))
        if all(len(stream) >= epochs * share + config.packing_buffer for stream in streams):
            break
    # Each epoch is a permutation, in which packing moves a sample by its buffer at most.
    slack = config.packing_buffer
    for stream in streams:
        places = collections.defaultdict(list)
        for place, key in enumerate(stream[: epochs * share + slack]):
            places[key].append(place)
        assert len(places) == share
        for key, found in places.items():
            assert len(found) >= epochs, key
            for epoch, place in enumerate(found):
                assert epoch * share - slack <= place < (epoch + 1) * share + slack, (key, found)
        assert stream[:share] != stream[share : 2 * share], "each epoch has its own order"
    assert len(set().union(*streams)) == count
    print({"samples": count, "epochs": epochs, "megabytes after each epoch": [round(size / 1e6) for size in memory]})
    assert memory[-1] < 1.05 * memory[0] + 20e6
