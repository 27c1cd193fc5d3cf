"""The package's names: all there, imported when they are first used, and not before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import wan_model
from wan_model.system.lazy import lazy_names


@pytest.mark.parametrize("name", wan_model.__all__)
def test_every_name_of_the_package_resolves(name: str) -> None:
    value = getattr(wan_model, name)
    assert value is getattr(sys.modules[value.__module__], name) if hasattr(value, "__module__") else value is not None


def test_importing_the_package_imports_no_torch() -> None:
    script = """
import json, sys
import wan_model, wan_model.system.files, wan_model.system.units, wan_model.system.lazy
heavy = [name for name in ("torch", "numpy", "einops", "diffusers", "transformers") if name in sys.modules]
from wan_model import WanConfig
print(json.dumps([heavy, "torch" in sys.modules, WanConfig().hidden_size]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False, 1536]


def test_other_names_are_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'wan_model' has no attribute 'WanModel'"):
        wan_model.WanModel  # noqa: B018
    get, _ = lazy_names("wan_model", {"THETA": "dit.rope"})
    assert get("THETA") == 10000.0
    with pytest.raises(AttributeError, match="has no attribute 'theta'"):
        get("theta")


@pytest.mark.parametrize("package", ["wan_model"])
def test_names_are_listed_before_they_are_used(package: str) -> None:
    script = f"import {package}; print(set({package}.__all__) <= set(dir({package})), '__version__' in dir({package}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_a_type_checker_refuses_other_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text("from wan_model import WanConfig, WanModl\n\nWanConfig(num_layers=1)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run([*command, str(tmp_path / "user.py")], capture_output=True, text=True, check=False)
    assert 'Module "wan_model" has no attribute "WanModl"' in done.stdout, done.stdout + done.stderr
    assert "Found 1 error" in done.stdout
