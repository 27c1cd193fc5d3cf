"""What happens around the loop's steps: resuming the data, the log, the line on the terminal.

Import only after ``wan_train.engine.start``.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from wan_train.checkpoints import ResumePoint, read_loader_state
from wan_train.step import LOSS, WanForwardStep


def _is_reporting_rank() -> bool:
    # The loss is known on the last pipeline stage; one rank of it writes.
    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


class WanCallback(Callback):
    """Hooks into Megatron-Bridge's loop.

    Args:
        step: the forward step, which counts tokens.
        resume: the checkpoint that the loop loads, or None.
        log: JSON lines file, one line a step; None for no log.
        report: called with a line for people.
    """

    def __init__(
        self, step: WanForwardStep, resume: ResumePoint | None, log: Path | None, report: Callable[[str], None]
    ) -> None:
        self.step, self.resume, self.log, self.report = step, resume, log, report
        self.started = time.monotonic()
        self.rate = 0.0

    def _write(self, entry: dict[str, Any]) -> None:
        if self.log is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_start(self, context: CallbackContext) -> None:
        """Continue the data where the checkpoint left it."""
        state = context.state
        step = state.train_state.step
        if step > 0:
            assert self.resume is not None, "the loop loaded a checkpoint that the run did not announce"
            iterator = state.cfg.dataset.train_iterator
            iterator.resume(read_loader_state(self.resume, iterator.rank), drawn=step * get_num_microbatches())
            if _is_reporting_rank():
                self._write({"event": "resumed", "step": step})
                self.report(f"resumed from step {step} in {self.resume.folder}")
        self.started = time.monotonic()

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Note the learning rate that the step will use; afterwards the scheduler has moved on."""
        self.rate = float(next(group["lr"] for group in context.optimizer.param_groups if group))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Log the step; stop every rank together where the gradient is not finite."""
        config, train_state = context.state.cfg, context.state.train_state
        step = train_state.step + 1  # the loop counts after this hook
        grad_norm = context.grad_norm
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise ValueError(f"the gradient's norm is {grad_norm} at step {step}; training stops, nothing was saved")
        if step % config.logger.log_interval and step != config.train.train_iters:
            return
        counts = self.step.take_counts()
        totals = torch.tensor(
            [counts.samples, counts.tokens, counts.tokens_padded], dtype=torch.int64, device=self.step.device
        )
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        now = time.monotonic()
        seconds, self.started = now - self.started, now
        if not _is_reporting_rank():
            return
        samples, tokens, padded = totals.tolist()
        loss = float(context.loss_dict[LOSS])
        self._write(
            {
                "step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": self.rate, "seconds": seconds,
                "samples": samples, "tokens": tokens, "tokens_padded": padded,
            }
        )  # fmt: skip
        self.report(
            f"step {step}/{config.train.train_iters}  loss {loss:.4f}  gradient {grad_norm:.3f}  rate {self.rate:.2e}  "
            f"{samples} samples  {tokens / seconds:,.0f} tokens/s"
        )
