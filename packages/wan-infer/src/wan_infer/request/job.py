"""What one call of the command is to make, of what and by what. Imports no torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from wan_infer.output.output_names import check_save_file, check_writable, ending
from wan_infer.request.prompt_file import Shot


@dataclasses.dataclass(frozen=True)
class Job:
    """What one call makes.

    Attributes:
        shots: the videos.
        fps: frames a second of the files.
        save_file: where the only video goes; None for names of our own in ``output_folder``.
        output_folder: made if absent.
        contact_sheet: where frames of all videos go, or None.
        metadata: whether files say how they were made.
    """

    shots: Sequence[Shot]
    fps: int
    save_file: Path | None
    output_folder: Path
    contact_sheet: Path | None
    metadata: bool

    @property
    def texts(self) -> list[str]:
        """All that is to be embedded, each once."""
        negatives = [shot.settings.negative_prompt for shot in self.shots if shot.settings.guidance != 1]
        return list(dict.fromkeys([*(shot.request.prompt for shot in self.shots), *negatives]))


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where everything comes from; see ``sources`` and ``WanSampler``."""

    model: str | None = None
    revision: str | None = None
    checkpoint_dir: str | None = None
    checkpoint_step: int | None = None
    ema: bool = False
    text_model: str | None = None
    vae_model: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Means:
    """By what it is made: devices, precision, processes; see ``placement``, ``sharing`` and ``decode``."""

    device: str = "auto"
    dtype: str = "auto"
    t5_cpu: bool = False
    offload: bool = False
    cfg_parallel: bool = False
    shard_weights: bool = False
    tiles: int = 1


def check_outputs(job: Job) -> None:
    """Refuse what cannot be written, before anything is loaded.

    Raises:
        ValueError: one file for several videos, a wrong ending, or a place that cannot be written to.
    """
    if job.save_file is not None:
        if len(job.shots) > 1:
            raise ValueError(
                f"--save-file takes one video and {len(job.shots)} were asked for; use --output-folder for several"
            )
        check_save_file(job.save_file, job.shots[0].request.frames)
        check_writable(job.save_file)
    else:
        check_writable(job.output_folder / f"0000{ending(job.shots[0].request.frames)}")
    if job.contact_sheet is not None:
        if job.contact_sheet.suffix.lower() != ".png":
            raise ValueError(f"cannot save the contact sheet to {job.contact_sheet}: its name must end in .png")
        check_writable(job.contact_sheet)
