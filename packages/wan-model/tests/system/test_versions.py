"""Versions of dependencies are compared with the bounds in a package's metadata, and named in one sentence."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_model.system.versions import VersionError, check_dependencies

Installed = dict[str, tuple[str, list[str]]]
HERE = {
    "wan-train": ("0.1.0", ["wan-model[codec]<0.2", "megatron-core<0.20,>=0.16.0a0", 'wandb>=1; extra == "engine"']),
    "wan-model": ("0.1.0", ["torch>=2.10.0a0", 'diffusers>=0.37; extra == "codec"', 'tomli; python_version < "3"']),
    "megatron-core": ("0.17.0rc0+1234abc", []),
    "torch": ("2.10.0a0+b4e4ee81d3.nv25.12", []),
    "diffusers": ("0.37.0", []),
}  # fmt: skip


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Installed], None]:
    """Makes these the only distributions that are installed."""

    def write(installed: Installed) -> None:
        for name, (version, requires) in installed.items():
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            lines = [f"Requires-Dist: {one}" for one in requires]
            (info / "METADATA").write_text(
                "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
            )
        found = importlib.metadata.MetadataPathFinder.find_distributions

        def only_there(context: importlib.metadata.DistributionFinder.Context):
            return found(importlib.metadata.DistributionFinder.Context(name=context.name, path=[str(tmp_path)]))

        monkeypatch.setattr(importlib.metadata.MetadataPathFinder, "find_distributions", only_there)

    return write


def test_versions_within_the_bounds_are_accepted_also_nvidias_prereleases(install: Callable[[Installed], None]) -> None:
    install(HERE)
    check_dependencies("wan-train")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"torch": ("2.9.1", [])}, "wan-model needs torch>=2.10.0a0, and 2.9.1 is installed"),
        ({"megatron-core": ("0.20.0", [])}, "wan-train needs megatron-core>=0.16.0a0,<0.20, and 0.20.0 is installed"),
        ({"diffusers": None}, "wan-model needs diffusers>=0.37, which is not installed"),
        (
            {"diffusers": ("0.30.0", []), "torch": ("2.9.1", [])},
            "wan-model needs torch>=2.10.0a0, and 2.9.1 is installed; "
            "wan-model needs diffusers>=0.37, and 0.30.0 is installed",
        ),
    ],
)  # fmt: skip
def test_the_sentence_names_what_was_found_and_what_is_needed(
    changed: Installed, sentence: str, install: Callable[[Installed], None]
) -> None:
    install({name: value for name, value in (HERE | changed).items() if value is not None})
    with pytest.raises(VersionError) as caught:
        check_dependencies("wan-train")
    assert str(caught.value) == f"{sentence}: install what is needed with pip"


def test_extras_are_checked_where_they_are_needed(install: Callable[[Installed], None]) -> None:
    install(HERE)
    with pytest.raises(VersionError, match="wan-train needs wandb>=1, which is not installed"):
        check_dependencies("wan-train", ["engine"])


def test_sources_that_are_not_installed_are_not_checked(install: Callable[[Installed], None]) -> None:
    install({})
    check_dependencies("wan-train")
    install({"wan-train": HERE["wan-train"], "megatron-core": ("0.16.1", [])})  # wan-model is on PYTHONPATH
    check_dependencies("wan-train")


@pytest.mark.parametrize("name", ["wan-model", "wan-data", "wan-train", "wan-infer"])
def test_this_environment_is_right(name: str) -> None:
    check_dependencies(name)
