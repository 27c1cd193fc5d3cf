"""The stages of the check in their order. Imports no torch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, which runs in a process of its own.

    Attributes:
        name: on the command line.
        title: in the report.
        function: ``module:function``; the function takes a ``gpu.context.Context`` and yields rows.
        share: of the time, as seconds of eight minutes; of one beside others, on a CPU.
        beside: runs beside the stages behind it, up to the first one that is timed.
        timed: measures times, so that nothing may run beside it.
    """

    name: str
    title: str
    function: str
    share: float
    beside: bool = False
    timed: bool = False


STAGES = (
    Stage("versions", "Versions, card and packages", "gpu.versions:rows", 15),
    # Bound by the start of their processes on the CPU.
    Stage("training", "wan-train at a tiny size: save, resume, FSDP", "gpu.training:rows", 70, beside=True),
    Stage("sampler", "The sampler at a tiny size", "gpu.sampler:rows", 70, beside=True),
    Stage("kernels", "Fused kernels against their formulae in fp64", "gpu.kernels:rows", 55),
    Stage("attention", "Attention against fp64", "gpu.attention:rows", 60),
    Stage("model", "The model: precision, recomputation, determinism", "gpu.model:rows", 25),
    Stage("step", "A training step of the 1.3B model", "gpu.step:rows", 115, timed=True),
    Stage("bandwidth", "Bandwidth of the fused kernels", "gpu.bandwidth:rows", 35, timed=True),
    Stage("bridge", "wan-train on the 1.3B model", "gpu.training:real_rows", 60, timed=True),
    Stage("sampling", "A sampling step of the 1.3B model", "gpu.sampling:rows", 45, timed=True),
    Stage("autoencoder", "The autoencoder: 81 frames decoded and encoded", "gpu.autoencoder:rows", 60, timed=True),
    Stage("profile", "The longest kernels of a training step", "gpu.longest_kernels:rows", 20, timed=True),
)
