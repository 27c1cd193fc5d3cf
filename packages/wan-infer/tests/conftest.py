import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from wan_model.testing.devices import hide_gpus
from wan_model.testing.once import Once, once_in, session_folder
from wan_model.testing.shapes import check_shapes

if TYPE_CHECKING:
    from wan_infer.sampling.sampler import WanSampler

sys.path.insert(0, str(Path(__file__).parent))  # for parallel_probe
torch.set_num_threads(1)
check_shapes("wan_infer")


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a file or folder once for all test processes."""
    return once_in(session_folder(tmp_path_factory, "wan-infer"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1 in diffusers' layout."""
    from wan_model.tiny import write_tiny_wan

    return write_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def sampler(model_folder: Path) -> "WanSampler":
    from wan_infer.sampling.sampler import WanSampler

    return WanSampler.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def write_checkpoint(model_folder: Path) -> Callable[..., Path]:
    """``write_checkpoint_of`` for the tiny model."""
    from tiny_sources import write_checkpoint_of

    return functools.partial(write_checkpoint_of, model_folder)
