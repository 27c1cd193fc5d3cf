"""Gathers the wheels that the GPU check wants on a machine without a network, at the tested versions."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.rows import one_line

ROOT = Path(__file__).resolve().parents[2]
# What a machine with torch, transformers and the usual packages of numerical work lacks. The training loop imports no
# others without Transformer Engine: ``wan_train.engine`` leaves out the rest of what Megatron-Bridge declares.
PACKAGES = {
    "comparison with diffusers": ("diffusers", "importlib-metadata", "zipp", "lazy-importer"),
    # Diffusers asks for it, and transformers does no more.
    "diffusers' requests": ("requests", "certifi", "charset-normalizer", "idna", "urllib3"),
    "prompts and videos": ("ftfy", "wcwidth", "av"),
    # wan-data writes shards for it, and imports it only to read them.
    "preparing": ("megatron-energon",),
    "training": ("megatron-core", "megatron-bridge", "psutil", "defusedxml", "omegaconf"),
    "tests marked gpu": ("beartype",),
}
# It has no wheel in the registry.
BUILT = ("antlr4-python3-runtime",)
MOST_MIB = 49.0
# pip takes each name exactly; some wheels have only one of the later ones.
_PLATFORMS = [
    *("manylinux1_x86_64", "manylinux2014_x86_64"),
    *(f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28, 31, 34)),
]


def pins() -> dict[str, str]:
    """The tested version of each package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def commands(folder: Path, python: str) -> list[list[str]]:
    """The calls of pip, one for each package, so that one that fails is named.

    Raises:
        ValueError: a package without a tested version.
    """
    versions = pins()
    names = [name for group in PACKAGES.values() for name in group]
    if missing := [name for name in (*names, *BUILT) if name not in versions]:
        raise ValueError(f"constraints.txt has no version of {', '.join(missing)}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [option for platform in _PLATFORMS for option in ("--platform", platform)]
    found = [
        [*pip, "download", "--no-deps", *target, "--dest", str(folder), f"{name}=={versions[name]}"] for name in names
    ]
    for name in BUILT:
        found.append([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), f"{name}=={versions[name]}"])
    return found


def unknown_wheels(folder: Path) -> list[str]:
    """Wheels of a folder that are not of the list at their tested versions."""
    versions = pins()
    wanted = {
        f"{name.replace('-', '_')}-{versions[name]}-"
        for name in (*(name for group in PACKAGES.values() for name in group), *BUILT)
    }
    return [path.name for path in sorted(folder.glob("*.whl")) if not path.name.startswith(tuple(wanted))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a wheel is missing or all of them are too large."""
    parser = argparse.ArgumentParser(prog="gpu_wheels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the wheels")
    parser.add_argument("--python", default="3.12", help="version of Python there (default: 3.12)")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for command in commands(given.out, given.python):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed.append(f"{command[-1]}: {one_line(done.stderr or done.stdout)}")
    wheels = sorted(given.out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    failed += [f"{name} is not of this list; remove it" for name in unknown_wheels(given.out)]
    if total > MOST_MIB:
        failed.append(f"the wheels take {total:.1f} MiB; at most {MOST_MIB:g} were to be carried")
    for line in failed:
        print(f"Error: {line}", file=sys.stderr)
    print(f"{total:7.2f} MiB  {len(wheels)} wheels for Python {given.python} in {given.out}")
    return 1 if failed else 0
