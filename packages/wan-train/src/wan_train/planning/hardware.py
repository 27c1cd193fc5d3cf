"""Compute, bandwidth and memory of GPUs, for planning."""

import dataclasses
from pathlib import Path
from typing import Self

from wan_model.system.gpus import peak_tflops
from wan_model.system.safe_reading import read_yaml


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One GPU and its interconnect.

    Attributes:
        name: of the GPU.
        peak: dense bf16 operations per second, of the data sheet.
        matmul: highest rate of matrix products.
        attention_forward, attention_backward: highest rate of attention over long sequences, of the operations that
            are required: twice as many in the backward pass.
        memory: bytes.
        reserved: bytes for the driver, communication buffers and fragmentation.
        bandwidth: memory bandwidth, bytes per second.
        intra_node: bytes per second and direction between the GPUs of a node (NVLink).
        inter_node: the same between nodes, per GPU (network cards).
        gpus_per_node: number of them.
        efficiency: fraction of all these rates that a training step reaches.
    """

    name: str
    peak: float
    matmul: float
    attention_forward: float
    attention_backward: float
    memory: float
    reserved: float
    bandwidth: float
    intra_node: float
    inter_node: float
    gpus_per_node: int = 8
    efficiency: float = 0.85

    @classmethod
    def find(cls, name: str) -> Self:
        """A known GPU, or one described by a YAML file.

        Raises:
            ValueError: it is neither, or the file is invalid.
        """
        if name in KNOWN:
            return cls(**dataclasses.asdict(KNOWN[name]))
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"--gpu is {name!r}; expected one of {', '.join(KNOWN)}, or a YAML file that describes one"
            )
        content = read_yaml(path)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) - set(fields):
            unknown = sorted(map(str, set(content) - set(fields))) if isinstance(content, dict) else "no mapping"
            raise ValueError(f"{path} has {unknown}; expected a mapping of {', '.join(fields)}")
        given = {**dataclasses.asdict(KNOWN["h100"]), "name": path.stem, **content}
        for key in set(given) - {"name"}:
            try:
                given[key] = float(given[key])  # YAML reads 9e12 as a string
            except (TypeError, ValueError):
                given[key] = 0.0
            if not given[key] > 0:
                raise ValueError(f"{path}: {key} is {content[key]!r}; expected a number above 0")
        given["gpus_per_node"] = int(given["gpus_per_node"])
        for key in ("matmul", "attention_forward", "attention_backward"):
            if given[key] > given["peak"]:
                whose = "" if key in content else ", the h100's,"
                raise ValueError(
                    f"{path}: {key} is {given[key]:g}{whose} and peak is {given['peak']:g} operations per second; give "
                    "the rates of this GPU too: matmul, attention_forward and attention_backward"
                )
        return cls(**given)


_PEAK = peak_tflops("H100 80GB HBM3")
assert _PEAK is not None, "its data sheet is known"
_HOPPER = Hardware(
    name="h100",
    peak=_PEAK * 1e12,
    matmul=794e12,
    attention_forward=693e12,
    attention_backward=572e12 * 2 / 2.5,
    memory=80e9,
    reserved=6e9,
    bandwidth=3.35e12,
    intra_node=450e9,
    inter_node=50e9,
)
# Data sheets of the SXM variants, a network card of 400 Gbit/s for each GPU; rates of kernels as published for Hopper
# (cuBLAS, cuDNN with heads of 128). Published rates of attention's backward pass count 2.5 times the forward pass,
# because scores are computed again. BENCHMARKS.md compares the estimate with a measured step.
KNOWN = {"h100": _HOPPER, "h200": dataclasses.replace(_HOPPER, name="h200", memory=141e9, bandwidth=4.8e12)}


@dataclasses.dataclass(frozen=True)
class Card:
    """The memory of a GPU that a run is compared with.

    Attributes:
        memory: bytes.
        reserved: bytes for the driver, communication buffers and fragmentation.
    """

    memory: float
    reserved: float


# Beside those that are planned with, a card of 24 GB (NVIDIA's Ada architecture paper: 24 GB of GDDR6X), as the only
# GPU of a run: nothing is reserved for communication.
CARDS = {
    "rtx4090": Card(24e9, 2e9),
    **{name: Card(gpu.memory, gpu.reserved) for name, gpu in KNOWN.items()},
}
