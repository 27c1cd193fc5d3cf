"""Where the sources of Megatron-Bridge and Megatron-LM are, and the path on which Python finds them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BACKPORTS = Path(__file__).parent / "python311"
NVRX = "nvidia-resiliency-ext"


class SourceError(ValueError):
    """The sources cannot be found or downloaded."""


@dataclass(frozen=True)
class Repository:
    """A repository.

    Attributes:
        name: for messages and folders.
        url: where it is cloned from.
        packages: folder of the ``megatron`` namespace below a checkout.
        module: its package in that namespace.
    """

    name: str
    url: str
    packages: str
    module: str

    def resolve(self, given: str, cache: Path) -> Path:
        """The checkout that a path or a git reference (tag, branch, commit) names; a reference is downloaded once.

        Raises:
            SourceError: it is neither.
        """
        path = Path(given).expanduser()
        if path.exists():
            if (path / "megatron" / self.module).is_dir():  # the folder of the packages itself
                path = path.parents[len(Path(self.packages).parts) - 1] if self.packages != "." else path
            if not self._is_checkout(path):
                raise SourceError(f"{given} is no checkout of {self.name}: {self.packages}/megatron is missing")
            return path.resolve()
        checkout = cache / f"{self.name}-{given.replace('/', '_')}"
        if not self._is_checkout(checkout):
            self._download(given, checkout)
        return checkout

    def _is_checkout(self, path: Path) -> bool:
        return (path / self.packages / "megatron" / self.module).is_dir()

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


BRIDGE = Repository("Megatron-Bridge", "https://github.com/NVIDIA-NeMo/Megatron-Bridge", "src", "bridge")
CORE = Repository("Megatron-LM", "https://github.com/NVIDIA/Megatron-LM", ".", "core")


def core_of(bridge: Path) -> str:
    """The Megatron-LM that a checkout of Bridge names: its submodule if that is there, else the submodule's commit.

    Raises:
        SourceError: it has neither.
    """
    submodule = bridge / "3rdparty" / "Megatron-LM"
    if (submodule / "megatron" / "core").is_dir():
        return str(submodule)
    command = ["git", "-C", str(bridge), "ls-tree", "HEAD", "3rdparty/Megatron-LM"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = done.stdout.split()
    if done.returncode or len(parts) < 3:
        raise SourceError(f"{bridge} does not say which Megatron-LM it was made with; add --core PATH")
    return parts[2]


def install_resiliency(version: str, cache: Path) -> Path:
    """A folder with nvidia-resiliency-ext of that version.

    Its wheels are for systems newer than those that the tests run on, but the part that the loop uses is plain Python.

    Raises:
        SourceError: pip cannot install it.
    """
    target = cache / f"{NVRX}-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    if not (target / "nvidia_resiliency_ext").is_dir():
        wheels = ["--only-binary=:all:", "--platform", "manylinux_2_39_x86_64", "--platform", "manylinux_2_39_aarch64"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *wheels]
        if subprocess.run([*pip, f"{NVRX}=={version}"], check=False).returncode:
            raise SourceError(f"pip cannot install {NVRX}=={version}, which this Megatron-Core requires")
    return target


def python_path(bridge: Path, core: Path, further: list[str]) -> str:
    """PYTHONPATH with the sources before everything that is installed."""
    backports = [str(BACKPORTS)] if sys.version_info < (3, 12) else []
    already = os.environ.get("PYTHONPATH", "")
    places = [*backports, *further, str(bridge / BRIDGE.packages), str(core / CORE.packages), already]
    return os.pathsep.join(place for place in places if place)
