"""What a run says of its steps: a line for people, JSON lines, TensorBoard and Weights & Biases.

Import only after ``wan_train.engine.start``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core import parallel_state

from wan_model.system.units import format_seconds
from wan_train.loop.step import Counts
from wan_train.loop.validation import ValidationResult

# Dense bf16 TFLOP/s of a device, by what its name contains; NVIDIA's data sheets of the SXM variants.
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}


def peak_tflops(device: torch.device) -> float | None:
    """The device's peak, where its name is known."""
    if not torch.version.cuda or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What is known of the steps since the last record; the sums are over all data-parallel ranks.

    Attributes:
        step: the last of them; loss, grad_norm and learning_rate are that step's.
        seconds: since the last record, validations and saves left out.
        samples, tokens, tokens_padded, flops: see ``wan_train.loop.step.Counts``.
        data_wait: the largest of any rank, seconds.
        devices: of the whole run.
        peak_tflops: of one device, if known.
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
    devices: int
    peak_tflops: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of the samples, not of padding."""
        return self.tokens / self.seconds

    @property
    def packing_efficiency(self) -> float:
        """Share of the tokens computed that are the samples'."""
        return self.tokens / self.tokens_padded

    @property
    def tflops_per_device(self) -> float:
        """By what the mathematics needs: recomputation and padding count for nothing."""
        return self.flops / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Share of the peak."""
        return None if self.peak_tflops is None else self.tflops_per_device / self.peak_tflops

    def rates(self) -> dict[str, float]:
        """What follows from the counts."""
        values = {
            "tokens_per_second": self.tokens_per_second,
            "packing_efficiency": self.packing_efficiency,
            "tflops_per_device": self.tflops_per_device,
            "data_wait": self.data_wait,
        }
        return values if self.mfu is None else {**values, "mfu": self.mfu}

    def entry(self) -> dict[str, Any]:
        """A line of the JSON log."""
        plain = dataclasses.asdict(self)
        for name in ("devices", "peak_tflops"):
            del plain[name]
        return {**plain, **self.rates()}


def gather(counts: Counts, seconds: float, device: torch.device) -> tuple[Counts, float]:
    """Counts of all data-parallel ranks, and the longest time of any; every rank calls it."""
    sums = torch.tensor(
        [counts.samples, counts.tokens, counts.tokens_padded, counts.flops], dtype=torch.int64, device=device
    )
    longest = torch.tensor([counts.data_wait, seconds], dtype=torch.float64, device=device)
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_reduce(sums, group=group)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=group)
    wait, seconds = longest.tolist()
    samples, tokens, tokens_padded, flops = sums.tolist()
    return Counts(samples, tokens, tokens_padded, flops, wait), seconds


def is_reporting_rank() -> bool:
    """The loss is known on the last pipeline stage; one rank of it writes."""
    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


class Terminal:
    """Lines for people; on a terminal the newest step stays in one line.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._in_place = stream, False

    def say(self, line: str) -> None:
        """A line that stays."""
        self._stream.write(f"{self._clear()}{line}\n")
        self._stream.flush()
        self._in_place = False

    def progress(self, line: str) -> None:
        """A line that the next one replaces, where that can be."""
        if not self._stream.isatty():
            self.say(line)
            return
        self._stream.write(f"{self._clear()}{line}")
        self._stream.flush()
        self._in_place = True

    def end(self) -> None:
        """Leave the last line standing."""
        if self._in_place:
            self._stream.write("\n")
            self._stream.flush()
            self._in_place = False

    def _clear(self) -> str:
        return "\r\x1b[2K" if self._in_place else ""


class Report:
    """Where records go. Only the reporting rank writes the log; Bridge's writers are where Bridge made them.

    Args:
        log: JSON lines file; None for none.
        terminal: lines for people.
        steps: of the whole run.
    """

    def __init__(self, log: Path | None, terminal: Terminal, steps: int) -> None:
        self.log, self.terminal, self.steps = log, terminal, steps
        self._last: int | None = None

    def event(self, line: str | None = None, **entry: Any) -> None:
        """Something that happened once."""
        if is_reporting_rank():
            self._write(entry)
            if line:
                self.terminal.say(line)

    def step(self, record: StepRecord, state: Any) -> None:
        """A record of steps; called on every rank that knows the loss."""
        curves = {"loss": record.loss, "learning_rate": record.learning_rate, **record.rates()}
        if record.grad_norm is not None:
            curves["grad_norm"] = record.grad_norm
        self._curves({f"train/{name}": value for name, value in curves.items()}, record.step, state)
        if not is_reporting_rank():
            return
        self._write(record.entry())
        left = (self.steps - record.step) * self._pace(record)
        efficiency = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
        norm = "" if record.grad_norm is None else f"  gradient {record.grad_norm:.3f}"
        self.terminal.progress(
            f"step {record.step}/{self.steps}  loss {record.loss:.4f}{norm}  rate {record.learning_rate:.2e}  "
            f"{record.samples} samples  {record.tokens_per_second:,.0f} tokens/s  "
            f"{record.tflops_per_device:.3g} TFLOP/s a device{efficiency}  "
            f"full {record.packing_efficiency:.1%}  waited {record.data_wait:.2f} s  left {format_seconds(left)}"
        )

    def _pace(self, record: StepRecord) -> float:
        since = 1 if self._last is None else record.step - self._last
        self._last = record.step
        return record.seconds / since

    def validation(self, step: int, result: ValidationResult, state: Any) -> None:
        """A validation's result; called on every rank that knows it."""
        at = {f"{timestep:g}": loss for timestep, loss in result.at.items()}
        curves = {"validation/loss": result.loss, **{f"validation/loss_at_{key}": loss for key, loss in at.items()}}
        self._curves(curves, step, state)
        parts = "  ".join(f"{key}: {loss:.4f}" for key, loss in at.items())
        self.event(
            f"step {step}  validation loss {result.loss:.4f} of {result.samples} samples, at timesteps {parts}",
            event="validation",
            step=step,
            loss=result.loss,
            samples=result.samples,
            timesteps=at,
        )

    def _curves(self, values: dict[str, float], step: int, state: Any) -> None:
        if state.tensorboard_logger:
            for name, value in values.items():
                state.tensorboard_logger.add_scalar(name, value, step)
        if state.wandb_logger:
            state.wandb_logger.log(values, step)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.log is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
