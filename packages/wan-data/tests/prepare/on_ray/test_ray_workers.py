"""Preparations on a Ray cluster of three nodes: the same bytes and words as of one process, whatever is lost."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import threading

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")  # before the modules that import it

import ray
from data_command import run
from folder_digests import without_index
from on_ray_actors import lose_next_call, process_of, reused_actors, watched
from ray.cluster_utils import Cluster

from wan_data.prepare.on_ray import actor_pool
from wan_data.prepare.on_ray.actors import Copies, DecodeActor, ProbeActor
from wan_data.prepare.on_ray.cluster import check_address, ray_workers
from wan_data.prepare.on_ray.layout import Stage
from wan_data.storage.location import StorePath
from wan_data.storage.store import StoredObject
from wan_model.testing.processes import Job, wait_until

pytestmark = pytest.mark.xdist_group("ray")
# Objects of more bytes are in the store of a node, as frames and latents of real clips are.
SMALLEST_STORED = 500


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 8, "object_store_memory": 80 << 20}
        head = {**node, "include_dashboard": False, "_system_config": {"max_direct_call_object_size": SMALLEST_STORED}}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(**node)
        cluster.spare = node
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        with reused_actors():
            yield cluster
        ray.shutdown()
        cluster.shutdown()


KILLED = """
import os, signal, sys
from wan_data import cli
from wan_data.prepare.results import FinishedShard

write, written = FinishedShard.write, []

def killed_at_the_second(self, path):
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path)

FinishedShard.write = killed_at_the_second
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def killed_command(cluster, clips, tiny_model, tmp_path_factory):
    """A command with a cluster of its own that is killed. It begins first: Ray's workers may take a minute to end."""
    place = tmp_path_factory.mktemp("killed")
    options = {"video-folder": clips, "output-folder": place / "out", "model": tiny_model, "area": 1536, "frames": 9}
    options |= {"min-frames": 5, "samples-per-shard": 3, "validation-fraction": 1e-4, "device": "cpu", "on": "ray"}
    words = [f"--{name}={value}" for name, value in {**options, "num-decoders": 1}.items()]
    job = Job.start([sys.executable, "-P", "-c", KILLED, "prepare", *words], place)
    yield job
    job.end()


@pytest.fixture
def on_ray(cluster, prepare_again, tiny_model, settings):
    """Prepare clips on the cluster."""

    def run(clips, out, processes=1, decoders=1, settings=settings, **more):
        start = ray_workers(device="cpu", processes=processes, decoders=decoders)
        return prepare_again(clips, out, tiny_model, settings, start_workers=start, **more)

    return run


@pytest.fixture(scope="module")
def place_of_outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def out(place_of_outputs):
    """An output folder of one name for all tests, so that they can use the same writing actors."""
    yield place_of_outputs / "out"
    shutil.rmtree(place_of_outputs / "out", ignore_errors=True)


def test_the_bytes_of_several_actors_are_those_of_one_process(on_ray, dataset, clips, out):
    # Those of one actor of each stage, too: see below.
    on_ray(clips, out, processes=2, decoders=2)
    assert without_index(out) == without_index(dataset)


@pytest.fixture(scope="module")
def mixed_clips(clips, tmp_path_factory):
    """Clips of which one is damaged, one is no video, one has no caption, and one crashes its decoder."""
    folder = shutil.copytree(clips, tmp_path_factory.mktemp("mixed") / "clips")
    whole = (folder / "wide.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.mp4").write_text("a text")
    for name in ("cut", "text"):
        (folder / f"{name}.txt").write_text("A clip.")
    shutil.copy(folder / "wide.mkv", folder / "silent.mkv")
    return folder


def test_rejected_files_and_dropped_windows_are_said_as_by_one_process(
    on_ray, prepare_again, mixed_clips, tiny_model, settings, silent, tmp_path
):
    settings = dataclasses.replace(settings, batch_size=2, where="sharpness >= 0", measures=True)

    # A report that makes a clip another one when all are probed: its windows cannot be encoded.
    class Changing(type(silent)):
        def __init__(self, folder):
            super().__init__()
            self.folder = folder

        def stage(self, name, total):
            super().stage(name, total)
            if name == "encoding":
                (self.folder / "deep" / "tall.mkv").write_bytes(b"another file")

    reports, results = [], []
    for name in ("local", "ray"):
        folder = shutil.copytree(mixed_clips, tmp_path / name / "clips")
        reports.append(Changing(folder))
        more = {"settings": settings, "report": reports[-1]}
        out = tmp_path / name / "out"
        if name == "ray":
            results.append(on_ray(folder, out, **more))
        else:
            results.append(prepare_again(folder, out, tiny_model, **more))
    local, ray_lines = ([line for line in one.lines if not line.startswith(("loading", "Ray"))] for one in reports)
    assert ray_lines == local
    assert sum(line.startswith("REJECTED") for line in local) == 6
    assert results[0] == results[1]
    assert without_index(tmp_path / "ray" / "out") == without_index(tmp_path / "local" / "out")


def replace_node(cluster, number):
    cluster.add_node(**cluster.spare)
    cluster.remove_node(cluster.list_all_nodes()[number], allow_graceful=False)
    return number


STAGES = ("probe", "decode", "encode", "text", "write")


def test_the_calls_of_lost_actors_are_made_again(on_ray, dataset, clips, silent, out, monkeypatch):
    monkeypatch.setattr(actor_pool, "SECONDS_BEFORE_A_CALL_IS_SLOW", 0.0)
    lost = []

    def lose_the_second_call(pool, member, method):
        seen.append(pool.stage.name)
        if seen.count(pool.stage.name) == 2:
            lost.append(pool.stage.name)
            threading.Timer(0.2, lose_next_call(member)).start()

    seen = []
    with watched(lose_the_second_call):
        on_ray(clips, out, 2, 2, report=silent)
    assert {*lost} == {f"wan-data {stage}" for stage in STAGES}
    assert without_index(out) == without_index(dataset)
    said = [line for line in silent.lines if not line.startswith("wan-data ")]
    assert len(said) == len({*said}), "nothing is said twice"
    assert any("an actor has not answered for" in line for line in silent.lines)


def test_what_loses_every_actor_ends_the_run_with_a_sentence(on_ray, clips, dataset, monkeypatch, out):
    monkeypatch.setattr(actor_pool, "MOST_LOSSES", 1)

    def lose(pool, member, method):
        if method == "write":
            threading.Timer(0.2, lose_next_call(member)).start()

    message = r"shard 0 was given to 2 actors of the Ray cluster, which were all lost, the last because .*same command"
    with watched(lose), pytest.raises(ChildProcessError, match=message):
        on_ray(clips, out)
    on_ray(clips, out)
    assert without_index(out) == without_index(dataset)


def test_what_was_on_a_lost_node_is_made_again(cluster, on_ray, dataset, clips, out):
    removed = []

    def remove_a_node(pool, member, method):
        if method == "write" and not removed:
            removed.append(replace_node(cluster, 1))

    with watched(remove_a_node):
        on_ray(clips, out, 2, 2)
    assert removed
    assert without_index(out) == without_index(dataset)


def test_killed_at_random_nothing_is_lost_or_twice(cluster, on_ray, dataset, clips, length, out):
    wanted, rng, kills, processes = length(20, 2), random.Random(0), [], {}

    def kill_one(pool, member, method):
        if member.handle not in processes:
            with contextlib.suppress(ray.exceptions.RayError):  # it was killed just now
                processes[member.handle] = process_of(member)
        if processes and rng.random() < 0.1 and len(kills) < wanted:
            if rng.random() < 0.2:
                kills.append(replace_node(cluster, 1))
            else:
                kills.append(processes.pop(rng.choice([*processes])))
                with contextlib.suppress(ProcessLookupError):  # it was on a lost node
                    os.kill(kills[-1], signal.SIGKILL)

    runs = 0
    while len(kills) < wanted:
        with watched(kill_one):
            on_ray(clips, out, 2, 2)
        assert without_index(out) == without_index(dataset)
        shutil.rmtree(out)
        runs += 1
    print({"kills": len(kills), "runs": runs})


def test_a_killed_command_leaves_no_process_and_is_taken_up(killed_command, on_ray, dataset, clips, silent):
    assert killed_command.code(300.0) == -signal.SIGKILL, killed_command.errors.read_text()
    assert "Ray cluster at" in killed_command.errors.read_text()
    wait_until(lambda: not killed_command.alive(), "the cluster has ended with its command")
    out = killed_command.place / "out"
    on_ray(clips, out, report=silent)
    assert silent.lines[0] == "resuming the shards that an earlier run has planned"
    assert without_index(out) == without_index(dataset)


def test_ray_is_refused_under_torchrun_and_with_what_is_of_one_machine(cluster, clips, tmp_path, monkeypatch):
    options = ["prepare", "--video-folder", clips, "--output-folder", tmp_path / "out"]
    assert "--ray-address auto is of --on ray" in run(*options, "--ray-address", "auto").output
    with pytest.raises(ValueError, match="an address of Ray Client"):
        check_address("ray://head:10001")
    with pytest.raises(ValueError, match=r"nothing answers at 127.0.0.1:1 \(Connection refused\); start a Ray cluster"):
        check_address("127.0.0.1:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in run(*options, "--on", "ray").output


@pytest.mark.parametrize("actor", [ProbeActor, DecodeActor])
def test_actors_leave_no_local_copies(cluster, settings, actor):
    del cluster

    def folder_of_copies(actor):  # within the test, because the actors cannot import this module
        actor._copies.ahead(StoredObject(StorePath("s3", "nowhere", "x"), 1, 1))
        return actor._copies._folder

    pool = actor_pool.ActorPool(Stage("copies", 1, 0.01), actor, ((), settings, Copies(1000, 1)))
    (member,) = pool.members
    while not pool.started:
        list(pool.outcomes(ray.wait(pool.references(), timeout=60)[0]))
    folder = ray.get(member.handle.__ray_call__.remote(folder_of_copies))
    assert folder.is_dir()
    pool.close()
    assert not folder.exists()
