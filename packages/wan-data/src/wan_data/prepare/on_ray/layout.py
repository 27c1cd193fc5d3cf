"""How many actors a cluster gets for each stage, and which share of its processors and GPUs each of them takes."""

import dataclasses
import math
from collections.abc import Mapping

# One text encoder can serve so many autoencoders: of most windows the caption is known already.
_ENCODERS_PER_TEXT = 8
# Shares of a GPU, which Ray counts and does not enforce: the text encoder is on the GPU of an autoencoder, as it is in
# a preparation on one machine.
_OF_GPU, _OF_GPU_FOR_TEXT = 0.7, 0.3


@dataclasses.dataclass(frozen=True)
class Stage:
    """The actors of one stage.

    Attributes:
        name: as the dashboard shows it.
        actors: their number.
        cpus, gpus: that each takes of a node, as Ray counts them.
    """

    name: str
    actors: int
    cpus: float
    gpus: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The stages of a preparation on a cluster.

    Attributes:
        device: ``cpu`` or ``cuda``.
        probe, decode, encode, text, write: the stages; the first runs alone, the others together.
    """

    device: str
    probe: Stage
    decode: Stage
    encode: Stage
    text: Stage
    write: Stage


def make_layout(
    resources: Mapping[str, float], nodes: int, device: str, processes: int | None, decoders: int | None
) -> Layout:
    """Distribute the processors and GPUs of a cluster.

    Args:
        resources: of the cluster, as ``ray.cluster_resources()`` gives them.
        nodes: number of nodes.
        device: ``auto``, ``cpu`` or ``cuda``.
        processes: number of encoding actors; one for each GPU if None, or one for each node without GPUs.
        decoders: number of probing, and later of decoding actors; one for each processor if None.

    Raises:
        ValueError: the device is of no cluster, or is not there; or a number is below 1.
    """
    cpus, gpus = max(1, int(resources.get("CPU", 0))), int(resources.get("GPU", 0))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device} names a GPU of one machine; pass auto, cpu or cuda with --on ray")
    if device == "cuda" and not gpus:
        raise ValueError(
            "--device cuda needs a GPU, and the Ray cluster has none; pass --device cpu, or add a node with one"
        )
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    encoders = (gpus if on_gpu else nodes) if processes is None else processes
    decoding = cpus if decoders is None else decoders
    for name, number in (("--num-processes", encoders), ("--num-decoders", decoding)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    texts = math.ceil(encoders / _ENCODERS_PER_TEXT)
    writers = texts
    if on_gpu:
        texts = min(texts, gpus)
        share = _share(decoding + writers, cpus)
        of_gpu = math.floor(_OF_GPU / math.ceil(encoders / gpus) * 1e4) / 1e4
        # No processors, or those of a node could be taken by decoders while its GPUs have nothing to do.
        encode = Stage("wan-data encode", encoders, 0, of_gpu)
        text = Stage("wan-data text", texts, 0, _OF_GPU_FOR_TEXT)
    else:
        share = _share(decoding + writers + encoders + texts, cpus)
        encode, text = Stage("wan-data encode", encoders, share), Stage("wan-data text", texts, share)
    return Layout(
        "cuda" if on_gpu else "cpu",
        Stage("wan-data probe", decoding, _share(decoding, cpus)),
        Stage("wan-data decode", decoding, share),
        encode,
        text,
        Stage("wan-data write", writers, share),
    )


def _share(actors: int, cpus: int) -> float:
    """Of a processor for each of some actors: a part of 1, so that they fit however the processors are divided."""
    return math.floor(1e4 / math.ceil(actors / cpus)) / 1e4
