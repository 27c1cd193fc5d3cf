"""Engines that cannot be used are refused in one sentence that names what is found and what is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wan_train.engine.installed import resiliency_for

NVRX = 'NVRX_MIN_VERSION = "99.1.0"\n'


def write_engine(folder: Path, name: str, version: tuple[int, int, int], **files: str) -> None:
    """The files of a package of the ``megatron`` namespace that are looked at; keys have ``__`` for a slash."""
    package = folder / "megatron" / name
    parts = dict(zip(("MAJOR", "MINOR", "PATCH"), version, strict=True))
    info = "".join(f"{key} = {value}\n" for key, value in parts.items()) + "PRE_RELEASE = 'rc1'\nVERSION = (MAJOR,)\n"
    for file, content in {"__init__": "raise AssertionError('imported')", "package_info": info, **files}.items():
        path = package / f"{file.replace('__', '/') if file != '__init__' else file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def said(*first_on_the_path: Path, command: tuple[str, ...] = ("pretrain", "--recipe", "tiny", "--mock")) -> str:
    """What the command line says with these folders before everything that is installed; must be one sentence."""
    places = [*map(str, first_on_the_path), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "from wan_train.cli import main; main()", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("Error: ")


@pytest.mark.parametrize("command", [("pretrain", "--mock"), ("pretrain", "--mock", "--dry-run"), None])
def test_an_older_version_is_refused(command: tuple[str, ...] | None, tmp_path: Path) -> None:
    write_engine(tmp_path, "core", (0, 16, 1))
    write_engine(tmp_path, "bridge", (0, 2, 7), training__config="")
    sentence = said(tmp_path, command=command or ("config", "show", "wan_1_3b", "--resolved"))
    assert sentence.startswith("Megatron-Bridge is 0.2.7rc1; training needs 0.3 or newer: ")


def test_the_folder_that_the_wheel_of_core_lacks_is_named(tmp_path: Path) -> None:
    write_engine(tmp_path / "core", "core", (0, 18, 2))
    write_engine(tmp_path / "bridge", "bridge", (0, 5, 1), training__config="from megatron.training.config import X")
    sentence = said(tmp_path / "bridge", tmp_path / "core")
    assert sentence.startswith("Megatron-Bridge 0.5.1rc1 needs megatron.training")
    assert "put the checkout on PYTHONPATH" in sentence
    assert "0.5 with 0.18" in sentence


def test_megatron_training_of_another_checkout_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path / "wheel", "core", (0, 16, 1))
    write_engine(tmp_path / "checkout", "core", (0, 18, 2))
    write_engine(tmp_path / "checkout", "training", (0, 0, 0))
    write_engine(tmp_path / "bridge", "bridge", (0, 5, 1), training__config="from megatron.training.config import X")
    sentence = said(tmp_path / "bridge", tmp_path / "wheel", tmp_path / "checkout")
    assert "of the same Megatron-LM as Megatron-Core 0.16.1rc1" in sentence
    assert str(tmp_path / "checkout" / "megatron" / "training") in sentence
    assert str(tmp_path / "wheel" / "megatron" / "core") in sentence


def test_the_version_of_nvidia_resiliency_ext_that_core_needs_is_known(tmp_path: Path) -> None:
    asserts = {"dist_checkpointing__strategies__nvrx": NVRX}
    imports = {"dist_checkpointing__strategies__torch": "from nvidia_resiliency_ext.x import get_write_results_queue"}
    for name, files in {"new": asserts, "both": {**asserts, **imports}, "0.17.0": imports, "old": {}}.items():
        write_engine(tmp_path / name, "core", (0, 17, 0), **files)
    needed = {path.name: resiliency_for(path / "megatron" / "core") for path in tmp_path.iterdir()}
    assert needed == {"new": "99.1.0", "both": "99.1.0", "0.17.0": "0.6.0", "old": None}


def test_an_older_nvidia_resiliency_ext_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path, "core", (0, 18, 2), dist_checkpointing__strategies__nvrx=NVRX)
    write_engine(tmp_path, "bridge", (0, 5, 1), training__config="")
    sentence = said(tmp_path)
    assert sentence.startswith("Megatron-Core 0.18.2rc1 needs nvidia-resiliency-ext 99.1.0 or newer, and ")
    assert sentence.endswith(" is installed: pip install 'nvidia-resiliency-ext>=99.1.0'")


@pytest.mark.parametrize("has_function", [False, True])
def test_a_build_of_nvidia_resiliency_ext_without_a_version_counts_by_its_content(
    has_function: bool, tmp_path: Path
) -> None:
    """Core 0.17.0 asserts no version; NVIDIA's container has one built from a commit."""
    imports = "from nvidia_resiliency_ext.x import get_write_results_queue"
    write_engine(tmp_path, "core", (0, 17, 0), dist_checkpointing__strategies__torch=imports)
    write_engine(tmp_path, "bridge", (0, 2, 0), training__config="")
    file = tmp_path / "nvidia_resiliency_ext" / "checkpointing" / "async_ckpt" / "filesystem_async.py"
    file.parent.mkdir(parents=True)
    file.write_text("def get_write_results_queue(mode): ...\n" if has_function else "")
    (tmp_path / "nvidia_resiliency_ext" / "__init__.py").touch()  # else an installed one would be found
    metadata = tmp_path / "nvidia_resiliency_ext-0.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: 0.0.0\n")
    script = (
        "from wan_train.engine import installed\n"
        "try: installed._require_resiliency()\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    said = "Megatron-Core 0.17.0rc1 needs nvidia-resiliency-ext 0.6.0 or newer, and 0.0.0 is installed"
    assert done.stdout.startswith("" if has_function else said)
    assert bool(done.stdout) is not has_function


def test_a_package_without_version_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path, "core", (0, 18, 2))
    write_engine(tmp_path, "bridge", (0, 5, 1), package_info="MAJOR = 'x'\n", training__config="")
    assert "package_info.py does not give the version of Megatron-Bridge" in said(tmp_path)


def test_versions_that_cannot_be_imported_together_are_named(tmp_path: Path) -> None:
    """An import that fails somewhere inside is no traceback either."""
    write_engine(tmp_path, "core", (0, 97, 2), __init__="from typing import no_such_name")
    write_engine(tmp_path, "bridge", (0, 98, 1), training__config="")
    script = "from wan_train import engine; engine.start()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "EngineError: Megatron-Bridge 0.98.1rc1 with Megatron-Core 0.97.2rc1 cannot be imported by Python 3." in last
    assert "no_such_name" in last
    assert "use a pair that wan-train knows" in last
