"""Where the sources of Megatron-Bridge and Megatron-LM are, and the path on which Python finds them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BACKPORTS = Path(__file__).parent / "python311"
NVRX = "nvidia-resiliency-ext"
_VERSION = re.compile(r"\d+(\.\d+)+")


class SourceError(ValueError):
    """The sources cannot be found or downloaded."""


@dataclass(frozen=True)
class Repository:
    """Where one of the two comes from.

    Attributes:
        name: for messages and folders.
        url: where it is cloned from.
        distribution: its name on a package index.
        packages: folder of the ``megatron`` namespace below a checkout.
        module: its package in that namespace.
    """

    name: str
    url: str
    distribution: str
    packages: str
    module: str

    def resolve(self, given: str, cache: Path) -> Path:
        """The folder that has to be on Python's path; what is not on this machine is downloaded once.

        Args:
            given: a checkout, a version on the package index, or a git reference (tag, branch, commit).
            cache: where downloads are kept.

        Raises:
            SourceError: it is none of these.
        """
        path = Path(given).expanduser()
        if path.exists():
            for place in (path / self.packages, path):
                if (place / "megatron" / self.module).is_dir():
                    return place.resolve()
            missing = Path(self.packages) / "megatron" / self.module
            raise SourceError(f"{given} is no checkout of {self.name}: {missing} is missing")
        if _VERSION.fullmatch(given):
            return install(f"{self.distribution}=={given}", cache, f"megatron/{self.module}")
        place = cache / f"{self.name}-{given.replace('/', '_')}" / self.packages
        if not (place / "megatron" / self.module).is_dir():
            self._download(given, cache / place.relative_to(cache).parts[0])
        return place

    def _download(self, reference: str, checkout: Path) -> None:
        checkout.mkdir(parents=True, exist_ok=True)
        for command in (
            ["init", "--quiet"],
            ["fetch", "--quiet", "--depth", "1", self.url, reference],
            ["checkout", "--quiet", "--force", "FETCH_HEAD"],
        ):
            done = subprocess.run(["git", "-C", str(checkout), *command], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().splitlines()
                raise SourceError(
                    f"{reference} is neither a folder nor a reference of {self.url} that can be downloaded"
                    f"{f' ({reason[-1]})' if reason else ''}"
                )


BRIDGE = Repository(
    "Megatron-Bridge", "https://github.com/NVIDIA-NeMo/Megatron-Bridge", "megatron-bridge", "src", "bridge"
)
CORE = Repository("Megatron-LM", "https://github.com/NVIDIA/Megatron-LM", "megatron-core", ".", "core")


def core_of(bridge: Path) -> str:
    """The Megatron-LM that a checkout of Bridge names: its submodule if that is there, else the submodule's commit.

    Args:
        bridge: the checkout's ``src``.

    Raises:
        SourceError: it has neither.
    """
    submodule = bridge.parent / "3rdparty" / "Megatron-LM"
    if (submodule / "megatron" / "core").is_dir():
        return str(submodule)
    command = ["git", "-C", str(bridge.parent), "ls-tree", "HEAD", "3rdparty/Megatron-LM"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = done.stdout.split()
    if done.returncode or len(parts) < 3:
        raise SourceError(f"{bridge} does not say which Megatron-LM it was made with; add --core")
    return parts[2]


def install(requirement: str, cache: Path, content: str) -> Path:
    """A folder with one distribution of the package index, without its dependencies.

    The wheels are those for Python 3.12 on recent systems, because Bridge is for no other and what the loop uses of all
    of them is plain Python.

    Raises:
        SourceError: pip cannot install it.
    """
    target = cache / requirement.replace("==", "-")
    if not (target / content).is_dir():
        platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in (28, 39) for machine in ("x86_64", "aarch64")]
        wheels = ["--only-binary=:all:", "--python-version", "3.12", "--ignore-requires-python"]
        for platform in platforms:
            wheels += ["--platform", platform]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *wheels]
        if subprocess.run([*pip, requirement], check=False).returncode:
            raise SourceError(f"pip cannot install {requirement}")
    return target


def python_path(bridge: Path, core: Path, further: list[str]) -> str:
    """PYTHONPATH with the sources before everything that is installed."""
    backports = [str(BACKPORTS)] if sys.version_info < (3, 12) else []
    already = os.environ.get("PYTHONPATH", "")
    places = [*backports, *further, str(bridge), str(core), already]
    return os.pathsep.join(place for place in places if place)
