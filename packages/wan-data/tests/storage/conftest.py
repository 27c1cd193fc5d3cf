"""A bucket on a server of its own, with a proxy before it; and the dataset that a disk gets."""

from pathlib import Path

import pytest
from store_fixtures import bucket, proxy, served
from stored_datasets import prepare_stored

__all__ = ["bucket", "proxy", "served"]


@pytest.fixture(scope="session")
def from_disk(once, clips, tiny_model) -> Path:
    """The dataset that the command makes of the clips on the disk."""

    def build(folder: Path) -> None:
        result = prepare_stored(tiny_model, "--video-folder", clips, "--output-folder", folder)
        assert result.exit_code == 0, result.output

    return once("stored-reference", build)
