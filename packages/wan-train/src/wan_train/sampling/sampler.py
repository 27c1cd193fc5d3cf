"""Videos while a run trains; see ``wan_train.config.samples``.

Import only after ``wan_train.engine.start``.

The last rank makes the plan, decodes and writes, because Megatron-Bridge's TensorBoard and W&B writers are there. No
failure here ends a run: it is one sentence in the log, and training goes on. What cannot be caught is a rank that fails
alone inside the model's communication, as in a training step.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from wan_train.checkpoint.sample_videos import samples_folder
from wan_train.engine.upstream.loop import CallbackContext
from wan_train.model.forward_only import evaluation_mode
from wan_train.sampling.latents import Runtime, SamplePlan, sample_latents
from wan_train.sampling.output import VideoWriter
from wan_train.sampling.plan import make_plan


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What came of one time of sampling, equal on every rank.

    Attributes:
        videos: number of files, also of those before a failure.
        wanted: number of videos of the plan.
        seconds: that training waited.
        folder: of the files.
        weights: ``weights`` or ``ema``.
        failure: one sentence if it failed, else None.
    """

    videos: int
    wanted: int
    seconds: float
    folder: Path
    weights: str
    failure: str | None


def _sentence(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _from_last_rank(make: Callable[[], Any]) -> Any:
    """A value that the last rank makes, on every rank; collective."""
    last = torch.distributed.get_world_size() - 1
    values = [make() if torch.distributed.get_rank() == last else None]
    torch.distributed.broadcast_object_list(values, src=last)
    return values[0]


class TrainingSampler:
    """Samples with the model of the training loop.

    Args:
        config: of the run.
        device: of this rank's model.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        self._config, self._device = config, device
        self._run = Path(config.checkpoint.save)
        self._weights = "ema" if config.samples.ema else "weights"
        self._writer: VideoWriter | None = None
        # The plan, or the reason why there is none.
        self._plan: SamplePlan | str = _from_last_rank(self._make_plan)

    def _make_plan(self) -> SamplePlan | str:
        try:
            plan, codec = make_plan(self._config)
        except Exception as error:
            return _sentence(error)
        self._writer = VideoWriter(
            self._run, plan, codec, self._device, fps=self._config.samples.fps, weights=self._weights
        )
        return plan

    @property
    def reason(self) -> str | None:
        """Why nothing will be sampled, or None."""
        return self._plan if isinstance(self._plan, str) else None

    @property
    def cut(self) -> Sequence[str]:
        """Sentences about prompts that are longer than what the model takes."""
        return self._plan.cut if isinstance(self._plan, SamplePlan) else ()

    def due(self, done: int, steps: int) -> bool:
        """Whether videos are sampled after a step of the run."""
        return self.reason is None and (done % self._config.samples.interval == 0 or done == steps)

    def run(self, context: CallbackContext, done: int) -> SampleResult:
        """Sample with the current weights, which must have been gathered; collective."""
        assert isinstance(self._plan, SamplePlan), "asked by due"
        begun = time.monotonic()
        latents: list[torch.Tensor] = []
        failure: str | None = None
        try:
            with evaluation_mode(context.model), self._chosen_weights(context):
                latents = sample_latents(self._plan, self._runtime(context))
        except Exception as error:
            failure = _sentence(error)

        def write() -> tuple[int, str | None]:
            assert self._writer is not None, "the last rank made the plan"
            if failure is not None:
                return 0, failure
            written, error = self._writer.write(done, latents, context.state)
            return written, None if error is None else _sentence(error)

        # Every rank waits here, so that no rank counts the seconds to its next step.
        videos, failure = _from_last_rank(write)
        seconds = time.monotonic() - begun
        folder = samples_folder(self._run, done)
        return SampleResult(videos, len(self._plan.requests), seconds, folder, self._weights, failure)

    def _runtime(self, context: CallbackContext) -> Runtime:
        model, dataset = self._config.model, self._config.dataset
        return Runtime(
            model=context.model,
            seq_length=model.seq_length,
            patch_size=model.wan_config.patch_size,
            capacity=dataset.capacity,
            multiple=dataset.pad_multiple,
            device=self._device,
            dtype=model.params_dtype,
        )

    @contextlib.contextmanager
    def _chosen_weights(self, context: CallbackContext) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._config.samples.ema:
                group = parallel_state.get_data_parallel_group(with_context_parallel=True)
                for part in unwrap_model(context.model):
                    stack.enter_context(part.ema.in_place_of_weights(group))
            yield
