"""What a run may not read by the permissions of the system is one sentence, before a step."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from training_runs import BASE_OPTIONS, RUN_OPTIONS, data_options, run, sentence_of
from warm_ranks import Call

from wan_model.testing.permissions import permissions_apply
from wan_train.checkpoint.record import RECORD_NAME
from wan_train.cli import main


@pytest.mark.parametrize(
    ("unreadable", "named"),
    [
        ("load", "load"),
        ("load/iter_0000006", f"load/iter_0000006/{RECORD_NAME}"),
        (f"load/iter_0000006/{RECORD_NAME}", f"load/iter_0000006/{RECORD_NAME}"),
        ("load/iter_0000006/__0_0.distcp", "load/iter_0000006/__0_0.distcp"),
        ("load/iter_0000006/run_config.yaml", "load/iter_0000006/run_config.yaml"),
        ("run.yaml", "run.yaml"),
        ("on-data/data", "on-data/data/.nv-meta"),
        ("on-data/data/shard-rank00-000001.tar.idx", "on-data/data/shard-rank00-000001.tar.idx"),
        ("on-data/data/shard-rank00-000001.tar", "on-data/data/shard-rank00-000001.tar"),
        ("on-data/model", "on-data/model/"),
    ],
)
def test_it_is_named(unreadable: str, named: str, one_process_run: Path, dataset: Path, tmp_path: Path) -> None:
    options = [*RUN_OPTIONS, "train.train_iters=7"]
    match unreadable.split("/")[0]:
        case "load":
            shutil.copytree(one_process_run, tmp_path / "load")
            options.append(f"checkpoint.load={tmp_path / 'load'}")
        case "run.yaml":
            (tmp_path / "run.yaml").write_text("train: {train_iters: 1}")
            options += ["--config-file", str(tmp_path / "run.yaml")]
        case "on-data":
            shutil.copytree(dataset, tmp_path / "on-data")
            options = [*BASE_OPTIONS, "train.train_iters=1", *data_options(tmp_path / "on-data")]
    place, mode = tmp_path / unreadable, (tmp_path / unreadable).stat().st_mode
    place.chmod(0)
    try:
        ended = run(options, tmp_path / "run", calls=[Call("rank_calls:apply_permissions")])
    finally:
        place.chmod(mode)
    said = sentence_of(ended)
    assert "\n" not in said
    assert re.search(
        rf"{re.escape(str(tmp_path / named))}\S*: Permission denied|{named} cannot be read: Permission", said
    )
    assert "delete" not in said, "nothing is damaged"
    assert not (tmp_path / "run" / "log.jsonl").exists(), "a step was taken"


@pytest.mark.parametrize(
    "command", [["export", "run", "model"], ["plan", "--gpu", "run"], ["config", "copy", "tiny", "run"]]
)
def test_the_other_commands_say_it_too(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if command[0] == "plan":
        Path("run").write_text("{}")
    else:
        Path("run").mkdir()
    Path("run").chmod(0)
    with permissions_apply():
        result = CliRunner().invoke(main, command)
    assert result.exit_code != 0
    (line,) = result.output.splitlines()
    assert re.match(r"Error: .*\brun\b.*: Permission denied", line)
