"""The check of the ways to install: it passes and fails as it should, and checks what the documents say."""

import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from installs.check import RouteError, check
from installs.routes import TE_TORCH, TRANSFORMER_ENGINE, Route, routes
from installs.stub_wheel import write_stub_wheel
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ROUTES = routes(ROOT)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An index of two stub wheels, and one that needs them; no other is looked at."""
    write_stub_wheel(tmp_path, "torch", "2.13.0")
    write_stub_wheel(tmp_path, "mamba-ssm", "2.0")
    write_stub_wheel(tmp_path, "app", "1.0", ["torch>=2.10.0a0"])
    write_stub_wheel(tmp_path, "strict-app", "1.0", ["torch>=2.10"])
    write_stub_wheel(tmp_path, "greedy-app", "1.0", ["mamba-ssm"])
    write_stub_wheel(tmp_path, "impossible-app", "1.0", ["torch>=3"])
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}


CONTAINER = {"torch": "2.10.0a0+nv"}


def test_what_is_there_is_kept(offline):
    route = Route("here", ["pip install app"], CONTAINER, ("app",))
    assert check(route, ROOT, sys.executable, **offline) == {"app": "1.0"}


@pytest.mark.parametrize(
    ("app", "installs", "reason"),
    [
        ("strict-app", ("strict-app",), "torch 2.10.0a0[+]nv would be replaced by 2.13.0"),
        ("greedy-app", ("greedy-app",), "mamba-ssm 2.0 would be installed"),
        ("app", ("other-app",), "other-app would not be installed"),
        ("impossible-app", ("impossible-app",), "pip install impossible-app .* ended with status 1"),
    ],
)
def test_a_route_that_does_not_work_fails_with_the_reason(app, installs, reason, offline):
    route = Route("here", [f"pip install {app}"], CONTAINER, installs)
    with pytest.raises(RouteError, match=reason):
        check(route, ROOT, sys.executable, **offline)


def test_every_command_is_documented():
    documents = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("packages/*/*.md"))
    documents += (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    for route in ROUTES:
        for command in route.commands:
            assert command in documents, f"{route.name}: {command}"


def test_every_release_of_the_container_has_its_routes():
    names = {route.name for route in ROUTES}
    for release in ("26.02", "26.04", "26.06", "26.08"):
        assert {f"nemo-{release}", f"nemo-{release}-dockerfile"} <= names
    five = {"torch", "megatron-core", "megatron-bridge", "transformer-engine", "megatron-energon"}
    for route in ROUTES:
        if route.name.startswith("nemo"):
            assert set(route.present) == five, route.name


def test_transformer_engine_has_the_bounds_of_the_extra():
    project = tomllib.loads((ROOT / "packages/wan-train/pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["te"])
    assert Requirement(shlex.split(TRANSFORMER_ENGINE)[-1]) == extra
    assert set(TE_TORCH) == {"transformer-engine-torch"}
