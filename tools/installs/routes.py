"""The documented ways to install, and what each finds on its machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

# What Megatron-Bridge brings along by its own requirements, and what only builds against CUDA.
BUILT_AGAINST_CUDA = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "transformer-engine-torch")
CHECKOUT = "pip install ./packages/wan-model ./packages/wan-data"
EXTRAS = f"{CHECKOUT.removesuffix('./packages/wan-data')}'./packages/wan-data[s3,curation,ray]'"
STORES = EXTRAS.replace("[s3,curation,ray]", "[s3,gs]")
OF_EXTRAS = ("boto3", "ray", "scenedetect-headless")
ENGINE = [f"{CHECKOUT} './packages/wan-train[engine]'", "pip install --no-deps megatron-bridge==0.3.1"]
PAGE = f"{CHECKOUT} './packages/wan-train[report]'"
TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.10,<2.13'"
# Built against CUDA when it is installed; here only its requirements are of interest.
TE_TORCH = {"transformer-engine-torch": ["torch", "einops", "onnx", "onnxscript", "pydantic", "nvdlfw-inspect"]}


@dataclass(frozen=True)
class Route:
    """One way to install on one kind of machine.

    Attributes:
        name: what it is called on the command line.
        commands: run from the root of the repository, in order.
        present: what the machine has: versions by name. None of it may be replaced.
        installs: what the commands must install.
        avoids: what they must not install.
        built: requirements of packages that can only be built on the real machine; stub wheels take their place.
        constraints: versions that the rest of the machine asks for, though they are not known one by one.
    """

    name: str
    commands: list[str]
    present: Mapping[str, str]
    installs: tuple[str, ...]
    avoids: tuple[str, ...] = BUILT_AGAINST_CUDA
    built: Mapping[str, list[str]] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()


def _versions(file: Path) -> dict[str, str]:
    pins = [Requirement(line) for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {pin.name: next(iter(pin.specifier)).version for pin in pins}


def _as_built_by_nvidia(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{version}+nv" if name == "torch" else version for name, version in versions.items()}


def routes(root: Path) -> list[Route]:
    """All routes; those of containers are made from ``docker/nemo-*.txt``."""
    training = ("wan-model", "wan-data", "wan-train")
    cuda = {"torch": "2.13.0+cu130", "triton": "3.7.1"}
    found = [
        Route("cuda", ENGINE, cuda, (*training, "megatron-core", "megatron-bridge")),
        Route("cuda-torch-2.11", ENGINE, {"torch": "2.11.0+cu128", "triton": "3.6.0"}, (*training, "megatron-bridge")),
        Route(
            "cuda-transformer-engine",
            [*ENGINE, TRANSFORMER_ENGINE],
            cuda,
            (*training, "transformer-engine"),
            avoids=BUILT_AGAINST_CUDA[:-1],
            built=TE_TORCH,
        ),
        Route("cpu", ENGINE, {"torch": "2.13.0+cpu"}, (*training, "megatron-core", "megatron-bridge", "triton")),
        Route("page", [PAGE], {"torch": "2.13.0+cpu"}, (*training, "jinja2", "plotly")),
        Route("sampler", ["pip install ./packages/wan-model ./packages/wan-infer"], cuda, ("wan-model", "wan-infer")),
        Route(
            "extras-of-data",
            [EXTRAS],
            cuda,
            ("wan-data", *OF_EXTRAS),
        ),
        Route("stores", [STORES], cuda, ("wan-data", "boto3", "google-cloud-storage")),
        Route("data", [CHECKOUT], cuda, ("wan-model", "wan-data"), avoids=(*BUILT_AGAINST_CUDA, "megatron-core")),
    ]
    for file in sorted(root.glob("docker/nemo-*.txt")):
        present = _as_built_by_nvidia(_versions(file))
        # Bridge asks for it, so these containers have such a version.
        before_5 = ("transformers<5",) if present["megatron-bridge"] < "0.5" else ()
        commands = {
            "": ([f"{CHECKOUT} ./packages/wan-train"], training),
            "-dockerfile": (["docker/install.sh"], (*training, "wan-infer")),
            "-extras": ([EXTRAS], ("wan-data", *OF_EXTRAS)),
        }
        for suffix, (lines, installs) in commands.items():
            found.append(Route(file.stem + suffix, lines, present, installs, constraints=before_5))
    return found
