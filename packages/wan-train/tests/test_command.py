"""The command line, without training."""

import sys

import pytest
from click.testing import CliRunner

import wan_train.engine.installed
import wan_train.launch.launcher
import wan_train.launch.worker
from wan_train.cli import main
from wan_train.config.options import RunOptions


@pytest.mark.parametrize("absent", ["megatron.core", "megatron.bridge"])
def test_a_missing_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(wan_train.engine.installed, "is_installed", lambda name: name != absent)
    result = CliRunner().invoke(main, ["pretrain", "--recipe", "tiny", "--mock"])
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert f"training needs {absent.replace('.', '-')}, which is not installed" in lines[0]
    assert "pip install" in lines[0]


def test_the_tutorials_spellings_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunOptions, int]] = []

    def record(options: RunOptions, ranks: int) -> int:
        seen.append((options, ranks))
        return 0

    monkeypatch.setattr(wan_train.launch.launcher, "launch", record)
    arguments = (
        "--training_mode finetune --config_file a.yaml --init_from w --mock --nproc_per_node 4 train.train_iters=3"
    )
    result = CliRunner().invoke(main, ["pretrain", *arguments.split()])
    assert result.exit_code == 0, result.output
    assert seen[0][0] == RunOptions(None, "finetune", "a.yaml", ("train.train_iters=3",), mock=True, init_from="w")
    assert seen[0][1] == 4


def test_under_torchrun_the_process_itself_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record() -> int:
        seen.append(sys.argv[1])
        return 0

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["wan-train"])
    monkeypatch.setattr(wan_train.launch.worker, "main", record)
    result = CliRunner().invoke(main, ["pretrain", "--recipe", "tiny", "--mock"])
    assert result.exit_code == 0, result.output
    assert RunOptions.from_json(seen[0]) == RunOptions("tiny", mock=True)
    result = CliRunner().invoke(main, ["pretrain", "--nproc-per-node", "2"])
    assert result.exit_code == 1
    assert "--nproc-per-node is given under torchrun" in result.output
