"""The first stage: what the other figures depend on."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

from gpu.context import Context
from gpu.rows import Failed, Found, NotRun, Row, Value

# Of distributions; a row says which are absent.
_PACKAGES = (
    *("numpy", "einops", "jaxtyping", "safetensors", "tokenizers", "transformers", "huggingface-hub", "pillow"),
    *("diffusers", "av", "ftfy", "megatron-core", "megatron-bridge", "nvidia-resiliency-ext", "omegaconf"),
    *("transformer-engine", "megatron-energon", "beartype", "pytest"),
)
# torch.cuda.get_device_properties has more, under names that differ between versions.
_SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "most SM MHz",
    "clocks.sm": "SM MHz now",
    "clocks.mem": "memory MHz now",
    "power.limit": "power limit W",
    "temperature.gpu": "degrees C",
    "memory.used": "memory used MiB",
}


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(context: Context) -> Found:
    import torch

    device = "cuda" if context.device != "cpu" and torch.cuda.is_available() else "cpu"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    numbers: dict[str, Value] = {
        "device": device,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
    }
    if (major, minor) < (2, 10):
        raise Failed(f"torch is {torch.__version__}; wan-model needs 2.10 or newer", numbers)
    if device == "cpu" and (context.device == "cuda" or (context.device == "auto" and shutil.which("nvidia-smi"))):
        raise Failed("torch sees no GPU although this machine has nvidia-smi, or --device asks for one", numbers)
    return Found(f"torch {torch.__version__} computes on {device}", numbers)


def _card(context: Context) -> Found:
    context.need_gpu()
    import torch

    from wan_model.system.gpus import peak_tflops

    it = torch.cuda.get_device_properties(0)
    capability = torch.cuda.get_device_capability(0)
    peak = peak_tflops(it.name)
    numbers: dict[str, Value] = {
        "card": it.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "memory GB": round(it.total_memory / 1e9, 1),
        "multiprocessors": it.multi_processor_count,
        "L2 MB": round(getattr(it, "L2_cache_size", 0) / 1e6, 1),
        "cards": torch.cuda.device_count(),
        "peak TFLOP/s": peak,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }
    known = "is not in wan_model.system.gpus, so no MFU is reported" if peak is None else f"is {peak:g} TFLOP/s"
    return Found(f"{it.name}, whose dense bf16 peak {known}", numbers)


def _driver(context: Context) -> Found:
    context.need_gpu()
    if (program := shutil.which("nvidia-smi")) is None:
        raise NotRun("nvidia-smi is not on the PATH")
    done = subprocess.run(
        [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_SMI):
        raise NotRun(f"nvidia-smi answered with status {done.returncode}: {done.stdout} {done.stderr}")
    return Found("as nvidia-smi reports", dict(zip(_SMI.values(), values, strict=True)))


def _triton() -> Found:
    import triton

    return Found(f"Triton {triton.__version__} is installed", {"Triton": triton.__version__})


def _compiler() -> Found:
    found = [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if not found:
        raise NotRun("there is no C compiler on the PATH, so Triton cannot build its launcher")
    return Found("Triton can build its launcher", {"compiler": found[0]})


def _packages() -> Found:
    versions: dict[str, Value] = {package: version_of(package) for package in _PACKAGES}
    absent = [package for package, version in versions.items() if version is None]
    return Found(f"absent: {', '.join(absent)}" if absent else "all are installed", versions)


def rows(context: Context) -> Iterator[Row]:
    """Versions of everything, the card and its clocks."""
    device = context.device
    for row in context.row("torch", lambda: _torch(context)):
        yield row
        device = str(row.numbers.get("device", device))
    context = dataclasses.replace(context, device=device)
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    numbers: dict[str, Value] = {"python": platform.python_version(), "cores": os.cpu_count(), "system": system}
    yield from context.row("machine", lambda: Found("the interpreter and the machine", numbers))
    yield from context.row("card", lambda: _card(context))
    yield from context.row("driver and clocks", lambda: _driver(context))
    yield from context.row("Triton", _triton)
    yield from context.row("C compiler", _compiler)
    yield from context.row("packages", _packages)
