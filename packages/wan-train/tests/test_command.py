"""The command line and the launcher, without training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import wan_train.installed
import wan_train.launch
import wan_train.worker
from wan_train.cli import RECIPES, main
from wan_train.options import RunOptions


@pytest.mark.parametrize("absent", ["megatron.core", "megatron.bridge"])
def test_a_missing_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(wan_train.installed, "is_installed", lambda name: name != absent)
    result = CliRunner().invoke(main, ["pretrain", "--recipe", "tiny", "--mock"])
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert f"training needs {absent.replace('.', '-')}, which is not installed" in lines[0]
    assert "pip install" in lines[0]


def test_the_tutorials_spellings_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def record(argument: str, ranks: int) -> int:
        seen.append((argument, ranks))
        return 0

    monkeypatch.setattr(wan_train.launch, "launch", record)
    arguments = (
        "--training_mode finetune --config_file a.yaml --init_from w --mock --nproc_per_node 4 train.train_iters=3"
    )
    result = CliRunner().invoke(main, ["pretrain", *arguments.split()])
    assert result.exit_code == 0, result.output
    options = RunOptions.from_json(seen[0][0])
    assert options == RunOptions("wan_1_3b", "finetune", "a.yaml", ("train.train_iters=3",), mock=True, init_from="w")
    assert seen[0][1] == 4


def test_under_torchrun_the_process_itself_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record() -> int:
        seen.append(sys.argv[1])
        return 0

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["wan-train"])
    monkeypatch.setattr(wan_train.worker, "main", record)
    result = CliRunner().invoke(main, ["pretrain", "--recipe", "tiny", "--mock"])
    assert result.exit_code == 0, result.output
    assert RunOptions.from_json(seen[0]) == RunOptions("tiny", mock=True)
    result = CliRunner().invoke(main, ["pretrain", "--nproc-per-node", "2"])
    assert result.exit_code == 1
    assert "--nproc-per-node is given under torchrun" in result.output


def test_ranks_find_each_other_by_torchruns_variables() -> None:
    values = wan_train.launch.environment(1, 2, 2345, {"PATH": "x"})
    assert (values["RANK"], values["WORLD_SIZE"], values["MASTER_ADDR"], values["MASTER_PORT"]) == (
        "1", "2", "127.0.0.1", "2345",
    )  # fmt: skip
    assert values["PATH"] == "x"
    assert wan_train.launch.environment(0, 2, 1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


_LAUNCH = """
import sys, wan_train.launch as launch
popen = launch.subprocess.Popen
launch.subprocess.Popen = lambda command, **options: popen([sys.executable, "-c", WORKER], **options)
sys.exit(launch.launch("", 2))
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for yet is dead all the same.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_one_failing_rank_ends_the_others(tmp_path: Path) -> None:
    worker = f"""
import os, sys, time
open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))
if os.environ['RANK'] == '1':
    while not os.path.exists(r'{tmp_path}/0'): time.sleep(0.01)
    sys.exit(5)
time.sleep(600)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"WORKER = {worker!r}\n{_LAUNCH}"], timeout=60, check=False, capture_output=True
    )
    assert done.returncode == 5, done.stderr
    assert not _alive(int((tmp_path / "0").read_text()))


def test_ending_the_launcher_ends_the_ranks(tmp_path: Path) -> None:
    worker = f"""
import os, time
open(r'{tmp_path}/' + os.environ['RANK'] + '.tmp', 'w').write(str(os.getpid()))
os.rename(r'{tmp_path}/' + os.environ['RANK'] + '.tmp', r'{tmp_path}/' + os.environ['RANK'])
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", f"WORKER = {worker!r}\n{_LAUNCH}"]) as launcher:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        pids = [int((tmp_path / rank).read_text()) for rank in "01"]
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 130
    assert not any(_alive(pid) for pid in pids)


def test_the_command_offers_every_recipe() -> None:
    source = (Path(wan_train.__file__).parent / "recipes.py").read_text()
    table = source[source.index("RECIPES: dict") :]
    assert all(f'"{name}":' in table for name in RECIPES)
    assert table.count('": ') == len(RECIPES)
