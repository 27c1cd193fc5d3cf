"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases, and a line per step on the terminal.

Import only after ``wan_train.engine.start``.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from wan_model.system.files import append_line
from wan_model.system.gpus import peak_tflops
from wan_model.system.memory import peak_memory
from wan_model.system.terminal import Terminal
from wan_model.system.units import format_seconds
from wan_train.loop.step import Counts
from wan_train.loop.validation import ValidationResult

if TYPE_CHECKING:  # see wan_train.loop.callback
    from wan_train.sampling.sampler import SampleResult


def peak_of_device(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the device; None for the CPU and for an unknown GPU."""
    if not torch.version.cuda or device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of the steps since the last log entry; sums are over all data-parallel ranks.

    Attributes:
        step: the last of these steps; loss, grad_norm and learning_rate are of that step.
        seconds: duration of these steps, without validations and saves.
        samples, tokens, tokens_padded, flops: see ``wan_train.loop.step.Counts``.
        data_wait: maximum over ranks, seconds.
        save_seconds: how long saves of these steps, or of the one before, have blocked the loop; 0 without a save.
        peak_memory: see ``wan_model.system.memory.peak_memory``; maximum over ranks.
        devices: number of devices of the run.
        peak_tflops: peak of one device, if known.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    seconds: float
    samples: int
    tokens: int
    tokens_padded: int
    flops: int
    data_wait: float
    save_seconds: float
    peak_memory: int
    devices: int
    peak_tflops: float | None

    @property
    def tokens_per_second(self) -> float:
        """Padding is not counted."""
        return self.tokens / self.seconds

    @property
    def packing_efficiency(self) -> float:
        """Tokens of samples / tokens including padding."""
        return self.tokens / self.tokens_padded

    @property
    def tflops_per_device(self) -> float:
        """Required operations only: recomputation and padding are not counted."""
        return self.flops / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: ``tflops_per_device`` / peak; None if the peak is unknown."""
        return None if self.peak_tflops is None else self.tflops_per_device / self.peak_tflops

    def rates(self) -> dict[str, float]:
        """The values derived from the counts."""
        values = {
            "tokens_per_second": self.tokens_per_second,
            "packing_efficiency": self.packing_efficiency,
            "tflops_per_device": self.tflops_per_device,
            "data_wait": self.data_wait,
        }
        return values if self.mfu is None else {**values, "mfu": self.mfu}

    def entry(self) -> dict[str, Any]:
        """The entry of the JSON log."""
        plain = dataclasses.asdict(self)
        for name in ("devices", "peak_tflops"):
            del plain[name]
        return {**plain, **self.rates()}


def reduce_metrics(counts: Counts, seconds: float, device: torch.device) -> tuple[Counts, float, int]:
    """Sums of the counts over data-parallel ranks, maximum duration and memory of all ranks; every rank calls it."""
    sums = torch.tensor(
        [counts.samples, counts.tokens, counts.tokens_padded, counts.flops], dtype=torch.int64, device=device
    )
    most = torch.tensor([counts.data_wait, seconds, peak_memory(device)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    # Of all ranks: those of another pipeline stage, or of another part of a layer, need other memory.
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    wait, seconds, memory = most.tolist()
    samples, tokens, tokens_padded, flops = sums.tolist()
    return Counts(samples, tokens, tokens_padded, flops, wait), seconds, int(memory)


def is_logging_rank() -> bool:
    """Whether this rank writes the log: one rank of the last pipeline stage, which has the loss."""
    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


class MetricsWriter:
    """Writes metrics. Only the logging rank writes the log; TensorBoard and W&B writers are those of Megatron-Bridge.

    Args:
        log: JSON lines file; None for no log.
        terminal: output for people.
        steps: number of steps of the run.
    """

    def __init__(self, log: Path | None, terminal: Terminal, steps: int) -> None:
        self.log, self.terminal, self.steps = log, terminal, steps
        self._last: int | None = None
        self._sampling_failed = False  # the last time

    def event(self, line: str | None = None, **entry: Any) -> None:
        """An event, such as a resume."""
        if is_logging_rank():
            self._write(entry)
            if line:
                self.terminal.print_line(line)

    def step(self, record: StepMetrics, state: Any) -> None:
        """Metrics of steps; called on every rank that has the loss."""
        curves = {"loss": record.loss, "learning_rate": record.learning_rate, **record.rates()}
        curves["peak_memory"] = record.peak_memory
        if record.grad_norm is not None:
            curves["grad_norm"] = record.grad_norm
        self._curves({f"train/{name}": value for name, value in curves.items()}, record.step, state)
        if not is_logging_rank():
            return
        self._write(record.entry())
        left = (self.steps - record.step) * self._seconds_per_step(record)
        efficiency = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
        norm = "" if record.grad_norm is None else f"  grad norm {record.grad_norm:.3f}"
        self.terminal.update_line(
            f"step {record.step}/{self.steps}  loss {record.loss:.4f}{norm}  lr {record.learning_rate:.2e}  "
            f"{record.samples} samples  {record.tokens_per_second:,.0f} tokens/s  "
            f"{record.tflops_per_device:.3g} TFLOP/s/device{efficiency}  "
            f"packing {record.packing_efficiency:.1%}  data wait {record.data_wait:.2f} s  ETA {format_seconds(left)}"
        )

    def _seconds_per_step(self, record: StepMetrics) -> float:
        since = 1 if self._last is None else record.step - self._last
        self._last = record.step
        return record.seconds / since

    def validation(self, step: int, result: ValidationResult, state: Any) -> None:
        """Result of a validation; called on every rank that has it."""
        at = {f"{timestep:g}": loss for timestep, loss in result.at.items()}
        curves = {"validation/loss": result.loss, **{f"validation/loss_at_{key}": loss for key, loss in at.items()}}
        gap: dict[str, float] = {} if result.caption_gap is None else {"caption_gap": result.caption_gap}
        self._curves({**curves, **{f"validation/{name}": value for name, value in gap.items()}}, step, state)
        parts = "  ".join(f"{key}: {loss:.4f}" for key, loss in at.items())
        said = "".join(f", caption gap {value:.3f}" for value in gap.values())
        self.event(
            f"step {step}  validation loss {result.loss:.4f} of {result.samples} samples, at timesteps {parts}{said}",
            event="validation",
            step=step,
            loss=result.loss,
            samples=result.samples,
            timesteps=at,
            **gap,
        )

    def samples(self, step: int, result: "SampleResult") -> None:
        """Sampled videos, or why some or all are missing; the terminal gets the first of several failures in a row."""
        entry: dict[str, Any] = {"event": "samples", "step": step, "seconds": result.seconds, "weights": result.weights}
        if result.failure is None:
            videos = f"{result.videos} video{'s' * (result.videos > 1)}"
            line = f"step {step}  {videos} of the {result.weights} in {result.seconds:.1f} s: {result.folder}"
            self.event(line, **entry, videos=result.videos)
            self._sampling_failed = False
            return
        videos = f"{result.videos} of {result.wanted} videos" if result.videos else "no videos"
        said = f"step {step}  {videos}: {result.failure}; training goes on"
        self.event(None if self._sampling_failed else said, **entry, videos=result.videos, failure=result.failure)
        self._sampling_failed = True

    def no_samples(self, step: int, reason: str) -> None:
        """The run samples no videos, although it was asked to."""
        self.event(
            f"samples.interval is set, and no videos will be sampled: {reason}",
            event="samples",
            step=step,
            videos=0,
            failure=reason,
        )

    def _curves(self, values: dict[str, float], step: int, state: Any) -> None:
        if state.tensorboard_logger:
            for name, value in values.items():
                state.tensorboard_logger.add_scalar(name, value, step)
        if state.wandb_logger:
            state.wandb_logger.log(values, step)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.log is not None:
            append_line(self.log, json.dumps(entry))
