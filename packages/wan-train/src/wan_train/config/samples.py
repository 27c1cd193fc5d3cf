"""The ``samples`` section of the configuration. Imports no torch and no Megatron."""

import dataclasses

from wan_model.sampling.settings import Settings, SolverName, check_seed
from wan_model.video_shape import check_frames, check_side


@dataclasses.dataclass
class SamplesConfig:
    """The ``samples`` section: videos that are sampled while a run trains.

    Attributes:
        interval: steps between two times of sampling, and the last step; 0 for none.
        count: captions, the first ones of the validation split.
        prompts: a text file with a prompt a line instead; the text encoder of the dataset's model embeds them once.
        width, height, frames: of the videos, in pixels and 4n+1 frames; None for those of the validation sample, with
            prompts those of the first one.
        steps, shift, guidance, solver, negative_prompt: see ``wan_model.sampling.settings.Settings``. An empty negative
            prompt is the dataset's empty caption, which training has seen in place of dropped captions.
        seed: of the first video's noise; each further one has the next number.
        ema: sample from the EMA of the weights.
        fps: frames a second of the files.
    """

    interval: int = 0
    count: int = 4
    prompts: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int = 50
    shift: float = 5.0
    guidance: float = 5.0
    solver: SolverName = "unipc"
    negative_prompt: str = ""
    seed: int = 0
    ema: bool = False
    fps: int = 16

    @property
    def settings(self) -> Settings:
        """Of the solver and the guidance."""
        return Settings(self.steps, self.shift, self.guidance, self.solver, self.negative_prompt)

    def check(self, *, ema_decay: float, saved: bool) -> None:
        """Validate the section.

        Args:
            ema_decay: of the ``ema`` section.
            saved: whether the run has a folder.

        Raises:
            ValueError: a setting is invalid.
        """
        if self.interval < 0:
            raise ValueError(f"samples.interval is {self.interval}; expected steps, or 0 for no videos")
        for name in ("count", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"samples.{name} is {getattr(self, name)}; expected at least 1")
        if self.frames is not None:
            check_frames("samples.frames", self.frames)
        for name in ("width", "height"):
            if (side := getattr(self, name)) is not None:
                check_side(f"samples.{name}", side)
        check_seed("samples.seed", self.seed, bits=62)  # the number of the video is added
        try:
            _ = self.settings
        except ValueError as error:
            raise ValueError(f"samples: {error}") from None
        if self.interval and self.ema and not ema_decay:
            raise ValueError("samples.ema is true and ema.decay is 0, so there is no EMA; set ema.decay")
        if self.interval and not saved:
            raise ValueError(
                f"samples.interval is {self.interval} and checkpoint.save is not set, so videos have no folder; set "
                "checkpoint.save, or samples.interval=0"
            )
