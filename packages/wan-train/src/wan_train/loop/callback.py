"""What happens around the loop's steps: resuming the data, the guard, the average, the log, the validation.

Import only after ``wan_train.engine.start``.
"""

import math
import time
from collections.abc import Callable

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.train import force_param_sync, should_disable_forward_pre_hook
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model

from wan_train.checkpoint.folder import ResumePoint, read_loader_state
from wan_train.loop.nan_guard import watch_gradient
from wan_train.loop.report import Report, StepRecord, gather, peak_tflops
from wan_train.loop.step import LOSS, WanForwardStep
from wan_train.loop.validation import Validator


class WanCallback(Callback):
    """Hooks into Megatron-Bridge's loop.

    Args:
        step: the forward step, which counts tokens.
        resume: the checkpoint that the loop loads, or None.
        report: where to say what happened.
        make_validator: called once the groups of ranks exist; None for no validation.
        paused: returns the seconds that saving took since it was last asked.
    """

    def __init__(
        self,
        step: WanForwardStep,
        resume: ResumePoint | None,
        report: Report,
        make_validator: Callable[[], Validator] | None,
        paused: Callable[[], float],
    ) -> None:
        self.step, self.resume, self.report = step, resume, report
        self.make_validator, self.paused = make_validator, paused
        self.validator: Validator | None = None
        self.started = time.monotonic()
        self.rate = 0.0
        self.peak: float | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Continue the data where the checkpoint left it."""
        state = context.state
        done = state.train_state.step
        if done > 0:
            assert self.resume is not None, "the loop loaded a checkpoint that the run did not announce"
            iterator = state.cfg.dataset.train_iterator
            iterator.resume(read_loader_state(self.resume, iterator.rank), drawn=done * get_num_microbatches())
            self.report.event(f"resumed from step {done} in {self.resume.folder}", event="resumed", step=done)
        elif self.resume is not None:
            origin = f"step {self.resume.step} in {self.resume.folder}"
            self.report.event(f"begins with the weights of {origin}", event="begun", weights_of=origin)
        if state.cfg.train.exit_signal_handler:
            state.signal_handler.__enter__()  # Bridge asks it whether a signal came, and never installs it
        watch_gradient(context.optimizer, self.step, lambda: state.train_state.step)
        self.peak = state.cfg.report.peak_tflops or peak_tflops(self.step.device)
        if self.make_validator is not None:
            self.validator = self.make_validator()
        self.started = time.monotonic()

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Note the learning rate that the step will use; afterwards the scheduler has moved on."""
        self.step.begin()
        self.rate = float(next(group["lr"] for group in context.optimizer.param_groups if group))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Average the weights, log, validate."""
        state = context.state
        config, done = state.cfg, state.train_state.step + 1  # the loop counts after this hook
        interval = config.validation.interval
        validates = self.validator is not None and (done % interval == 0 or done == config.train.train_iters)
        averages = [part.average for part in unwrap_model(context.model) if getattr(part, "average", None) is not None]
        if validates or averages:
            _have_all_weights(context)
        for average in averages:
            average.update()
        if done % config.logger.log_interval == 0 or done == config.train.train_iters:
            self._log(context, done)
        if validates:
            self._validate(context, done)

    def _log(self, context: CallbackContext, done: int) -> None:
        seconds = time.monotonic() - self.started - self.paused()
        counts, seconds = gather(self.step.take_counts(), seconds, self.step.device)
        self.started = time.monotonic()
        if LOSS not in context.loss_dict:  # not on this pipeline stage
            return
        loss = float(context.loss_dict[LOSS])
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done} although the gradient is finite; training stops")
        self.report.step(
            StepRecord(
                step=done,
                loss=loss,
                grad_norm=context.grad_norm,
                learning_rate=self.rate,
                seconds=seconds,
                samples=counts.samples,
                tokens=counts.tokens,
                tokens_padded=counts.tokens_padded,
                flops=counts.flops,
                data_wait=counts.data_wait,
                devices=torch.distributed.get_world_size(),
                peak_tflops=self.peak,
            ),
            context.state,
        )

    def _validate(self, context: CallbackContext, done: int) -> None:
        assert self.validator is not None
        begun = time.monotonic()
        result = self.validator.run(context)
        if result is not None:
            self.report.validation(done, result, context.state)
        self.started += time.monotonic() - begun

    def on_train_end(self, context: CallbackContext) -> None:
        """Leave the terminal in order."""
        del context
        self.report.terminal.end()


def _have_all_weights(context: CallbackContext) -> None:
    # Where the gathering of updated weights overlaps with the next forward pass, it has not begun yet.
    config = context.state.cfg
    if should_disable_forward_pre_hook(
        config.dist.use_megatron_fsdp, config.optimizer.use_distributed_optimizer, config.ddp.overlap_param_gather
    ):
        force_param_sync(context.model)
