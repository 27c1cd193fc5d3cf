"""``nox -s engine``: which sources it takes, without running wan-train's tests with them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines.sources import (
    BACKPORTS,
    BRIDGE,
    CORE,
    SourceError,
    core_of,
    python_path,
)

COMMIT = "0123456789" * 4


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    """A repository laid out as Megatron-Bridge's, whose submodule is not checked out."""
    root = tmp_path / "bridge"
    package = root / "src" / "megatron" / "bridge"
    package.mkdir(parents=True)
    (package / "package_info.py").write_text("MAJOR, MINOR = 0, 6\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{COMMIT},3rdparty/Megatron-LM")
    git(root, "commit", "-m", "A version")
    git(root, "tag", "v0.6.0")
    return root


def test_a_checkout_is_recognised_by_any_of_its_folders(bridge: Path, tmp_path: Path) -> None:
    assert BRIDGE.resolve(str(bridge), tmp_path / "cache") == bridge.resolve()
    assert BRIDGE.resolve(str(bridge / "src"), tmp_path / "cache") == bridge.resolve()
    (tmp_path / "lm" / "megatron" / "core").mkdir(parents=True)
    assert CORE.resolve(str(tmp_path / "lm"), tmp_path / "cache") == (tmp_path / "lm").resolve()
    with pytest.raises(SourceError, match="is no checkout of Megatron-LM"):
        CORE.resolve(str(bridge), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_reference_is_downloaded_once(bridge: Path, tmp_path: Path) -> None:
    repository = dataclasses.replace(BRIDGE, url=str(bridge))
    checkout = repository.resolve("v0.6.0", tmp_path / "cache")
    assert (checkout / "src" / "megatron" / "bridge" / "package_info.py").is_file()
    gone = dataclasses.replace(BRIDGE, url=str(tmp_path / "gone"))
    assert gone.resolve("v0.6.0", tmp_path / "cache") == checkout
    core = dataclasses.replace(CORE, url=gone.url)
    for absent in (gone, gone, core, core):  # a failed download is not taken for a checkout
        with pytest.raises(SourceError, match=r"v9 is neither a folder nor a reference of .*gone"):
            absent.resolve("v9", tmp_path / "cache")


def test_core_is_the_one_that_bridge_names(bridge: Path, tmp_path: Path) -> None:
    assert core_of(bridge) == COMMIT
    submodule = bridge / "3rdparty" / "Megatron-LM"
    (submodule / "megatron" / "core").mkdir(parents=True)
    assert core_of(bridge) == str(submodule)
    with pytest.raises(SourceError, match="add --core PATH"):
        core_of(tmp_path)


def test_processes_find_the_sources_before_what_is_installed(
    bridge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm" / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "further").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "already"))
    path = python_path(bridge, tmp_path / "lm", [str(tmp_path / "further")])
    places = [place for place in path.split(os.pathsep) if place != str(BACKPORTS)]
    assert places == [str(tmp_path / "further"), str(bridge / "src"), str(tmp_path / "lm"), str(tmp_path / "already")]
    script = "import typing, megatron; print(typing.override.__name__, *list(megatron.__path__)[:2], sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    override, *found = done.stdout.split()
    assert override == "override"
    assert found == [str(bridge / "src" / "megatron"), str(tmp_path / "lm" / "megatron")]
