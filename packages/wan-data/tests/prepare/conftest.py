"""Copies that tests may change."""

import shutil

import pytest

from wan_data.prepare.settings import PrepareSettings


@pytest.fixture
def copies(dataset, clips, tmp_path):
    """A dataset and its clips, to be changed."""
    return shutil.copytree(dataset, tmp_path / "out"), shutil.copytree(clips, tmp_path / "in")


@pytest.fixture
def settings(small):
    return PrepareSettings(**small)
