"""One thread a test process, shapes checked, and runs that several tests check made once."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_model.testing.devices import hide_gpus
from wan_model.testing.once import Once, once_in
from wan_model.testing.once import session_folder as shared_folder
from wan_model.testing.shapes import check_shapes

sys.path.insert(0, str(Path(__file__).parent))  # for training_runs
os.environ.setdefault("OMP_NUM_THREADS", "1")
check_shapes("wan_model", "wan_train")

import training_runs  # noqa: E402  these after the hook
from plain_training import Reference  # noqa: E402
from training_runs import (  # noqa: E402
    EQUALITY_SEED,
    call,
    equality_options,
    train,
    train_on_data,
    write_dataset,
    write_start,
)


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Common to all test processes."""
    base = shared_folder(tmp_path_factory, "wan-train")
    training_runs.ranks_folder = base
    yield base
    if training_runs.warm_ranks.cache_info().currsize:
        training_runs.warm_ranks().close()


@pytest.fixture(scope="session")
def once(session_folder: Path) -> Once:
    """Make a folder once for all test processes."""
    return once_in(session_folder)


@pytest.fixture(scope="session")
def reference_of(once: Once) -> Callable[[int], Reference]:
    """By seed: what every parallel layout, and training in plain torch, is compared with."""

    def make(seed: int) -> Reference:
        start = once(f"start-weights-{seed}", lambda folder: write_start(folder, seed))
        run = once(f"equality-{seed}", lambda folder: train(folder, *equality_options(start, seed)))
        write = "plain_training:write_plain_results"  # where shapes are not checked, which takes half the time
        plain = once(f"plain-{seed}", lambda path: call(write, str(path), str(start), seed))
        exact, scale = torch.load(plain, weights_only=True)
        return Reference(start, run, exact, scale)

    return make


@pytest.fixture(scope="session")
def start_weights(once: Once) -> Path:
    """A model folder to start from, whose every gradient is alive."""
    return once(f"start-weights-{EQUALITY_SEED}", write_start)


@pytest.fixture(scope="session")
def equality_reference(once: Once, start_weights: Path) -> Path:
    """One process of that, with an EMA."""
    options = equality_options(start_weights, EQUALITY_SEED)
    return once(f"equality-{EQUALITY_SEED}", lambda folder: train(folder, *options))


@pytest.fixture(scope="session")
def one_process_run(once: Once) -> Path:
    """Six steps, saved after each second one: what every interrupted run must equal."""
    return once("one-process-run", lambda folder: train(folder, "checkpoint.save_interval=2"))


@pytest.fixture(scope="session")
def dataset(once: Once) -> Path:
    """A dataset of small mixed latents, and the model that it was encoded with."""
    return once("dataset", write_dataset)


@pytest.fixture(scope="session")
def run_on_data(once: Once, dataset: Path) -> Callable[[int], Path]:
    """The uninterrupted run on data, with that many workers of the loader."""
    return lambda workers: once(f"on-data-{workers}", lambda folder: train_on_data(folder, dataset, workers))


@pytest.fixture(scope="session")
def probed(once: Once) -> dict[str, Any]:
    """What ``engine_probe.py`` found in a process of its own."""
    found: dict[str, Any] = json.loads(
        once("engine-probe", lambda path: call("engine_probe:probe", str(path))).read_text()
    )
    return found
