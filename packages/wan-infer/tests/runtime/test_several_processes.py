"""Two and four gloo processes against one: the same latents and frames, whatever is shared; and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parallel_probe import Sample, Source, sample
from safetensors.torch import save_file
from tiny_sources import tiny_lora, write_checkpoint_of

from wan_infer.output.video_file import read_video
from wan_infer.runtime.parallelism import Parallelism


def case(
    name: str, *, cfg: bool = False, shard: bool = False, tiles: int = 1, source: str = "released"
) -> dict[str, Any]:
    return {"name": name, "cfg_parallel": cfg, "shard_weights": shard, "tiles": tiles, "source": source}


# By the number of processes; where guidance is not split all of them share the tokens, else half of them each.
CASES = {
    2: [
        case("guidance", cfg=True),
        case("tokens"),
        case("guidance, weights", cfg=True, shard=True),
        case("tokens, weights", shard=True, tiles=2),
        case("weights of a checkpoint", shard=True, source="checkpoint"),
        case("weights with a LoRA", shard=True, source="lora"),
    ],
    3: [case("tokens, heads that do not divide"), case("the same, weights", shard=True)],
    4: [case("guidance x tokens", cfg=True), case("guidance x tokens, weights", cfg=True, shard=True)],
}


@pytest.fixture(scope="module")
def sources(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    write_checkpoint_of(model_folder, folder / "run", 10, seed=5)
    save_file(tiny_lora(), folder / "lora.safetensors")
    return {
        "released": {"checkpoint": None, "lora": None},
        "checkpoint": {"checkpoint": str(folder / "run"), "lora": None},
        "lora": {"checkpoint": None, "lora": str(folder / "lora.safetensors")},
    }


@pytest.fixture(scope="module")
def alone(model_folder: Path, sources: dict[str, Source]) -> dict[str, Sample]:
    """What one process makes of each source."""
    return {name: sample(str(model_folder), source, Parallelism(), 1) for name, source in sources.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_sources_differ(alone: dict[str, Sample]) -> None:
    assert off_by(alone["checkpoint"][0], alone["released"][0]) > 0.01
    assert off_by(alone["lora"][0], alone["released"][0]) > 0.01


@pytest.mark.parametrize("count", CASES)
def test_equal_to_one_process(
    count: int, alone: dict[str, Sample], sources: dict[str, Source], model_folder: Path, tmp_path: Path
) -> None:
    cases = [{**one, "source": sources[one["source"]]} for one in CASES[count]]
    port = str(free_port())
    script = Path(__file__).parents[1] / "parallel_probe.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(model_folder), str(tmp_path), json.dumps(cases)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for one in CASES[count]:
        latents, video, numbers = alone[one["source"]]
        for rank, result in enumerate(results):
            own_latents, own_video, own_numbers, own_rank = result[one["name"]]
            assert own_rank == rank
            off = off_by(own_latents, latents)
            assert off < 1e-4, f"{one['name']}: latents off by {off:.1e}"
            assert float((own_video - video).abs().max()) < 1e-3, one["name"]
            # The work is really shared: a process computes its part, and holds its part.
            share = count  # half of the branches by a half of the tokens is a quarter of both
            assert own_numbers["tokens"] == -(-numbers["tokens"] // share), one["name"]
            if one["shard_weights"]:
                assert own_numbers["held"] < 0.6 * numbers["held"], one["name"]
            else:
                assert own_numbers["held"] == numbers["held"]
        # And every process has the same.
        assert all(torch.equal(result[one["name"]][0], results[0][one["name"]][0]) for result in results)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wan_infer", *map(str, arguments)]


QUICK = ("--sizes", "32*48", "--frame_nums", "5", "--sample_steps", "2", "--device", "cpu")


WAYS = {
    "alone": ([], []),
    "two": ([], ["--nproc-per-node", 2, "--cfg-parallel", "--shard-weights"]),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2], ["--cfg-parallel"]),
}


def test_the_command_in_two_processes(model_folder: Path, tmp_path: Path) -> None:
    videos = {}
    for name, (starter, extra) in WAYS.items():
        path = tmp_path / f"{name}.mp4"
        done = subprocess.run(
            [sys.executable, *map(str, starter), *command(
                "--model", model_folder, "--prompts", "a rabbit", "--save_file", path, *QUICK, *extra, "--json"
            )[1:]],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["processes"] == (1 if name == "alone" else 2)
        assert report["peak_memory_bytes"] > 10_000_000
        assert done.stderr.count("step 2/2") == 1, "the first process speaks for all"
        videos[name] = read_video(path)[0].astype(int)
    for name in ("two", "torchrun"):
        assert np.abs(videos[name] - videos["alone"]).max() <= 2
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.mp4" for name in WAYS}


def test_what_stands_in_the_way_is_said_once(model_folder: Path, tmp_path: Path) -> None:
    broken = ("--model", tmp_path / "absent", "--prompts", "a", *QUICK, "--nproc-per-node", 2)
    done = subprocess.run(command(*broken), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("load")]
    assert len(errors) == 1
    assert errors[0].startswith("Error: no model at")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("whom", ["a child", "the launcher", "the launcher, politely"])
def test_all_end_together(whom: str, model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", model_folder, "--prompts", "a", *QUICK, "--save_file", tmp_path / "a.mp4")
    with subprocess.Popen(
        command(*arguments, "--sample_steps", 1000, "--nproc-per-node", 2), stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stderr is not None
        for line in launcher.stderr:
            if "step " in line:
                break
        children = _children(launcher.pid)
        assert len(children) == 2
        if whom == "a child":
            os.kill(children[1], signal.SIGTERM)
        else:
            launcher.send_signal(signal.SIGKILL if whom == "the launcher" else signal.SIGTERM)
        said = launcher.stderr.read()
        code = launcher.wait(30)
    if whom == "a child":
        assert code == 1
        assert "Error: process 1 was killed by SIGTERM" in said
    else:
        assert code == (-signal.SIGKILL if whom == "the launcher" else 128 + signal.SIGTERM)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.iterdir())
