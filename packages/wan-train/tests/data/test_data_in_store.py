"""Training on a dataset in an object store: the run, its resume and its failures are those of a dataset on a disk."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from training_runs import (
    BASE_OPTIONS,
    RUN_OPTIONS,
    STEPS_ON_DATA,
    data_options,
    read_log,
    refused_on,
    run,
    same_weights,
    sentence_of,
    steps_of,
    stopped_after,
    train_on,
    trajectory,
    write_dataset,
)

from wan_model.testing.object_store import ACCESS_KEY, SECRET_KEY, Fault, Proxy, environment, object_server
from wan_train.cli import main

STOPPED = STEPS_ON_DATA - 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Proxy]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket").mkdir()
    with object_server(folder) as port, contextlib.closing(Proxy(port)) as proxy:
        yield folder / "bucket", proxy


@pytest.fixture
def store(served: tuple[Path, Proxy]) -> tuple[Path, Proxy]:
    """The folder of a bucket named ``bucket``, and the proxy before it."""
    folder, proxy = served
    proxy.faults.clear()
    proxy.requests.clear()
    return folder, proxy


def finished(options: Sequence[str], folder: Path, proxy: Proxy, **variables: str) -> list[dict[str, Any]]:
    """The log of a run on the store, which must succeed."""
    ended = run(options, folder, environment=environment(proxy.url, **variables))
    assert ended.codes == [0], ended.errors
    return read_log(folder)


def refused(options: Sequence[str], folder: Path, proxy: Proxy, **variables: str) -> str:
    """The sentence with which a run on the store is refused, or ended."""
    return sentence_of(run(options, folder, environment=environment(proxy.url, **variables)))


def options_of(dataset: Path, url: str, workers: int = 0) -> list[str]:
    """Those of ``train_on_data``, with the dataset at a URL."""
    data = [f"dataset.path={url}", *data_options(dataset, workers)[1:]]
    return [*BASE_OPTIONS, *data, "ema.decay=0.9", f"train.train_iters={STEPS_ON_DATA}", "checkpoint.save_interval=2"]


def files_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_a_store_to_the_bit(
    workers: int,
    run_on_data: Callable[[int], Path],
    dataset: Path,
    store: tuple[Path, Proxy],
    tmp_path: Path,
) -> None:
    """After a failure of the store that has ended it in one sentence."""
    bucket, proxy = store
    shutil.copytree(dataset / "data", bucket / f"data-{workers}")
    options = options_of(dataset, f"s3://bucket/data-{workers}", workers)
    folder = stopped_after(STOPPED, run_on_data(workers), tmp_path / "run")
    proxy.faults[:] = [Fault("GET", r"\.idx", status=503, times=10**6)]
    said = refused(options, folder, proxy, WAN_DATA_STORE_PATIENCE="1")
    assert said.startswith(f"shard s3://bucket/data-{workers}/shard-rank00-")
    assert "it answered 503; run the same command again when the store answers" in said
    assert max(entry["step"] for entry in steps_of(read_log(folder))) == STOPPED
    proxy.faults[:] = [Fault("GET", r"\.idx", status=500), Fault("GET", r"\.tar(\?|$)", cut=100)]
    finished([*options, "dataset.cache_gb=0.1"], folder, proxy, WAN_DATA_CACHE=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.part"))
    assert not any(fault.times for fault in proxy.faults)
    assert trajectory(folder) == trajectory(run_on_data(workers))
    assert same_weights(folder, run_on_data(workers), STEPS_ON_DATA)
    left = files_of(folder)
    assert SECRET_KEY.encode() not in left
    assert ACCESS_KEY.encode() not in left


def test_a_run_validates_on_a_store_and_keeps_what_it_read(store: tuple[Path, Proxy], tmp_path: Path) -> None:
    bucket, proxy = store
    write_dataset(tmp_path / "dataset", manifest=True)
    shutil.copytree(tmp_path / "dataset" / "data", bucket / "with-manifest")
    more = ("train.train_iters=2", "validation.interval=2", "validation.samples=3", "dataset.cache_gb=0.01")
    options = [*BASE_OPTIONS, *data_options(tmp_path / "dataset"), *more]
    wanted = train_on(options, tmp_path / "disk")
    url = "dataset.path=s3://bucket/with-manifest"
    found = finished([*options, url], tmp_path / "store", proxy, WAN_DATA_CACHE=str(tmp_path / "cache"))

    def values(log: list[dict[str, object]]) -> list[object]:
        return [(entry.get("loss"), entry.get("validation_loss")) for entry in log if "event" not in entry]

    assert values(found) == values(wanted)
    assert list((tmp_path / "cache").rglob("*.part"))
    assert proxy.count("GET", "with-manifest.*start-after") >= 1


def test_a_dataset_that_is_not_there_or_cannot_be_asked_for_is_one_sentence(
    dataset: Path, store: tuple[Path, Proxy], tmp_path: Path
) -> None:
    _, proxy = store
    assert refused(options_of(dataset, "s3://bucket/nothing"), tmp_path / "run", proxy) == (
        "s3://bucket/nothing has no .nv-meta folder: expected a dataset that wan-data prepare wrote"
    )
    assert "a URL of ftp:// cannot be read" in refused(
        options_of(dataset, "ftp://bucket/data"), tmp_path / "run", proxy
    )
    proxy.faults[:] = [Fault(status=503, times=10**6)]
    said = refused(options_of(dataset, "s3://bucket/data-0"), tmp_path / "run", proxy, WAN_DATA_STORE_PATIENCE="0")
    assert said.startswith("s3://bucket/data-0/.nv-meta/dataset.yaml: looking failed 1 times")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("checkpoint.load", "checkpoint.load={}"),
        ("lora.init_from", "lora.init_from={}"),
        ("samples.prompts", "samples.prompts={}"),
        ("--config-file", "--config-file={}"),
        ("the model", "--init-from={}"),
    ],
)
def test_what_else_lies_in_a_store_is_refused_by_name(key: str, option: str, tmp_path: Path) -> None:
    said = refused_on((*RUN_OPTIONS, option.format("s3://bucket/x")), tmp_path)
    assert said.startswith(f"{key} is s3://bucket/x, and only datasets may lie in an object store; expected a path")


@pytest.mark.parametrize(
    "command", [["export", "gs://b/run", "out"], ["export", "run", "s3://b/out"], ["report", "msc://p/x"]]
)
def test_commands_on_runs_refuse_it_too(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0
    assert f" is {next(one for one in command if '://' in one)}, and only datasets may lie in" in result.output
