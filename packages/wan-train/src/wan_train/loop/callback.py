"""Hooks around the steps of the loop: data resume, NaN guard, EMA, metrics, validation, videos.

Import only after ``wan_train.engine.start``.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model

from wan_model.weights.lora_adapters import FoundAdapters
from wan_train.checkpoint.changes import new_run_from
from wan_train.checkpoint.file_checks import loader_state_path, read_loader_state, wrong_form_refused
from wan_train.checkpoint.folder import ResumePoint
from wan_train.checkpoint.hooks import CheckpointHooks
from wan_train.data.pack_iterator import PackIterator
from wan_train.engine.upstream.loop import (
    Callback,
    CallbackContext,
    GlobalState,
    force_param_sync,
    should_disable_forward_pre_hook,
)
from wan_train.loop.metrics import MetricsWriter, StepMetrics, peak_of_device, reduce_metrics
from wan_train.loop.nan_guard import guard_gradient
from wan_train.loop.step import LOSS, WanForwardStep
from wan_train.loop.validation import Validator
from wan_train.model.provider import WanModelProvider

if TYPE_CHECKING:  # a run that samples no videos does not wait for the codec
    from wan_train.sampling.sampler import TrainingSampler


class WanCallback(Callback):
    """Callbacks of Megatron-Bridge's loop.

    Args:
        step: the forward step, which counts tokens.
        resume: the checkpoint that the loop loads, or None.
        metrics: writes the log.
        make_validator, make_sampler: called once the process groups exist; None for no validation, and no videos.
        hooks: of saves and loads, whose calls are verified.
    """

    def __init__(
        self,
        step: WanForwardStep,
        resume: ResumePoint | None,
        metrics: MetricsWriter,
        make_validator: Callable[[], Validator] | None,
        make_sampler: Callable[[], "TrainingSampler"] | None,
        hooks: CheckpointHooks,
    ) -> None:
        self.step, self.resume, self.metrics = step, resume, metrics
        self.make_validator, self.make_sampler, self.hooks = make_validator, make_sampler, hooks
        self.state: GlobalState | None = None  # None before the first step of this process
        self._done: int | None = None
        self.validator: Validator | None = None
        self.sampler: TrainingSampler | None = None
        self.started = time.monotonic()
        self.learning_rate = 0.0
        self.peak: float | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Resume the data at the position of the checkpoint."""
        state = context.state
        done = state.train_state.step
        self.hooks.require_loaded()
        if done > 0:
            assert self.resume is not None, "the loop loads only the checkpoint that the run has resolved"
            iterator = state.cfg.dataset.train_iterator
            saved = read_loader_state(self.resume, iterator.rank)
            with wrong_form_refused(self.resume, loader_state_path(self.resume, iterator.rank)):
                try:
                    iterator.resume(saved, drawn=done * get_num_microbatches())
                except ValueError as error:
                    where = "" if state.cfg.dataset.mock else f"dataset.path is {state.cfg.dataset.path}: "
                    raise ValueError(f"{where}{error}; or {new_run_from(self.resume)}") from error
            self.metrics.event(f"resumed from step {done} in {self.resume.folder}", event="resumed", step=done)
        elif self.resume is not None:
            origin = f"step {self.resume.step} in {self.resume.folder}"
            self.metrics.event(f"starts from the weights of {origin}", event="begun", weights_of=origin)
        if done == 0 and (lora := state.cfg.model.initial_adapters) is not None:
            self.metrics.event(
                _starts_from(lora, state.cfg.model),
                event="lora_begun",
                step=done,
                lora=lora.where,
                rank=lora.rank,
                base=None if lora.base is None else lora.base.name,
            )
            state.cfg.model.initial_adapters = None  # the model has them
        if (rounding := state.cfg.model.fp8_error) is not None:
            self.metrics.event(
                f"the base is in fp8: its weights differ by {rounding.relative:.2%}, at most by {rounding.largest:.2%} "
                f"({rounding.name})",
                event="fp8_base", step=done, relative=rounding.relative, largest=rounding.largest,
            )  # fmt: skip
        if state.cfg.train.exit_signal_handler:
            state.signal_handler.__enter__()  # Bridge queries it for signals but never installs it
        guard_gradient(context.optimizer, self.step, lambda: state.train_state.step)
        self.peak = state.cfg.report.peak_tflops or peak_of_device(self.step.device)
        if self.make_validator is not None:
            self.validator = self.make_validator()
        if self.make_sampler is not None:
            self.sampler = self.make_sampler()
            if self.sampler.reason is not None:
                self.metrics.no_samples(done, self.sampler.reason)
            for sentence in self.sampler.cut:
                self.metrics.event(f"samples: {sentence}", event="prompt_cut", step=done, reason=sentence)
        self.started = time.monotonic()

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Record the learning rate of the step, before the scheduler advances."""
        config, done = context.state.cfg.checkpoint, context.state.train_state.step
        if done == self._done and config.save_interval and done % config.save_interval == 0:
            self.hooks.require_saved(config, done)
        self.step.begin()
        self.learning_rate = float(next(group["lr"] for group in context.optimizer.param_groups if group))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Update the EMA, log, validate."""
        state = context.state
        config, done = state.cfg, state.train_state.step + 1  # the loop increments it after this hook
        self._settle_data(config.dataset.train_iterator)
        self.state, self._done = state, done
        interval = config.validation.interval
        validates = self.validator is not None and (done % interval == 0 or done == config.train.train_iters)
        emas = [part.ema for part in unwrap_model(context.model) if getattr(part, "ema", None) is not None]
        samples = self.sampler is not None and self.sampler.due(done, config.train.train_iters)
        if validates or emas or samples:
            _gather_weights(context)
        for ema in emas:
            ema.update()
        if done % config.logger.log_interval == 0 or done == config.train.train_iters:
            self._log(context, done)
        if validates:
            self._validate(context, done)
        if samples:
            self._sample(context, done)

    def _settle_data(self, packs: PackIterator) -> None:
        """No pack is drawn between steps, where processes are forked and the run may end."""
        begun = time.perf_counter()
        packs.settle()
        self.step.counts.data_wait += time.perf_counter() - begun

    def _log(self, context: CallbackContext, done: int) -> None:
        save_seconds = self.hooks.take_seconds()
        seconds = time.monotonic() - self.started - save_seconds
        counts, seconds, memory = reduce_metrics(self.step.take_counts(), seconds, self.step.device)
        self.started = time.monotonic()
        if LOSS not in context.loss_dict:  # not on this pipeline stage
            return
        loss = float(context.loss_dict[LOSS])
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done} although the gradient is finite; training stops")
        self.metrics.step(
            StepMetrics(
                step=done,
                loss=loss,
                grad_norm=context.grad_norm,
                learning_rate=self.learning_rate,
                seconds=seconds,
                samples=counts.samples,
                tokens=counts.tokens,
                tokens_padded=counts.tokens_padded,
                flops=counts.flops,
                data_wait=counts.data_wait,
                save_seconds=save_seconds,
                peak_memory=memory,
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
            self.metrics.validation(done, result, context.state)
        self.started += time.monotonic() - begun

    def _sample(self, context: CallbackContext, done: int) -> None:
        assert self.sampler is not None
        result = self.sampler.run(context, done)
        self.metrics.samples(done, result)
        self.started += result.seconds

    def on_train_end(self, context: CallbackContext) -> None:
        """End the output line."""
        del context
        self.metrics.terminal.close()


def _starts_from(lora: FoundAdapters, model: WanModelProvider) -> str:
    text = (
        f"starts from the LoRA {lora.where}: rank {lora.rank}, factor {lora.factor:g}, {len(lora.tensors) // 2} linears"
    )
    if lora.base is not None and lora.base.digest != model.base_digest:
        text += f"; it was trained on {lora.base.name}, whose weights are not those of {model.init_from}"
    return text


def _gather_weights(context: CallbackContext) -> None:
    # With ddp.overlap_param_gather the updated weights are gathered only in the next forward pass.
    config = context.state.cfg
    if should_disable_forward_pre_hook(
        config.dist.use_megatron_fsdp, config.optimizer.use_distributed_optimizer, config.ddp.overlap_param_gather
    ):
        force_param_sync(context.model)
