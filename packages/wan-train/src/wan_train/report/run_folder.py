"""A run as the page has it, read from its folder: curves, marks of saves and resumes, sentences, settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_model.system.units import format_seconds
from wan_train.checkpoint.folder import saved_steps, step_folder
from wan_train.checkpoint.record import RECORD_NAME
from wan_train.checkpoint.sample_videos import left_out
from wan_train.report.curves import clock, half_lives, not_finite, plain, smooth, thin
from wan_train.report.run_log import RunLog
from wan_train.report.settings import newest_settings
from wan_train.report.videos import FoundVideo, RunVideos

_MOST_MARKS = 500
_NAMED = 5


@dataclass(frozen=True)
class Mark:
    """What is marked at a step of every chart.

    Attributes:
        kind: ``save``, ``resume`` or ``other``.
        step: number of completed steps; None if it is not known.
        text: what happened.
    """

    kind: str
    step: int | None
    text: str


@dataclass
class RunFolder:
    """A run's folder, which is read again while the run goes on.

    Args:
        folder: its checkpoint folder.
        name: on the page.

    Attributes:
        log: of the run.
        settings: by dotted key; empty if there are none.
        settings_from: the checkpoint that has them, or why there are none.
        saved: steps whose checkpoints are in the folder and complete.

    Raises:
        ValueError: the folder has no log.
    """

    folder: Path
    name: str
    log: RunLog = field(init=False)
    settings: dict[str, Any] = field(init=False, default_factory=dict)
    settings_from: str = field(init=False, default="")
    saved: list[int] = field(init=False, default_factory=list)
    _videos: RunVideos = field(init=False)
    _seen: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.log = RunLog(self.folder)
        self._videos = RunVideos(self.folder)
        self.refresh()

    def refresh(self) -> bool:
        """Read what is new; returns whether anything is. Where nothing is, only sizes and times of files are read.

        Raises:
            ValueError: the log cannot be read any more.
        """
        changed = self.log.read()
        steps = saved_steps(self.folder)
        saved = [step for step in steps if (step_folder(self.folder, step) / RECORD_NAME).is_file()]
        if (steps, saved) != self._seen:
            changed, self._seen, self.saved = True, (steps, saved), saved
            self.settings, self.settings_from = newest_settings(self.folder)
        return self._videos.refresh() or changed

    def videos(self, number: int) -> tuple[list[FoundVideo], list[str]]:
        """The sampled videos, and sentences about those that are left out; see ``RunVideos``."""
        return self._videos.find(number)

    @property
    def steps_of_run(self) -> int | None:
        """The last step that the run is to take, as its configuration says."""
        steps = self.settings.get("train.train_iters")
        return steps if type(steps) is int and abs(steps) < 1 << 53 else None

    def marks(self) -> list[Mark]:
        """Saves and resumes, by ascending step; those without a step are last."""
        marks = [Mark("save", step, "checkpoint in the folder") for step in self.saved]
        marks += self._saves_in_log()
        for event in self.log.events:
            kind = "resume" if event.kind == "resumed" else "other"
            marks.append(Mark(kind, event.step, f"{event.kind} {event.text}".strip()))
        return sorted(marks, key=lambda mark: (mark.step is None, mark.step or 0))

    def _saves_in_log(self) -> list[Mark]:
        """Saves whose checkpoints have been deleted since: their seconds are in the entry of the next steps."""
        curve = self.log.curves.get("save_seconds")
        if curve is None:
            return []
        marks, before = [], 0
        for step, seconds in zip(curve.steps, curve.values, strict=True):
            if seconds > 0 and not any(before <= saved < step for saved in self.saved):
                after = f"after step {before}" if step == before + 1 else f"between the steps {before} and {step}"
                marks.append(Mark("save", before, f"save {after}, its checkpoint is no longer in the folder"))
            before = step
        return marks

    def notes(self) -> list[str]:
        """Sentences about what is unusual in the folder."""
        log, notes = self.log, []
        if not log.curves:
            notes.append("The log has no step yet.")
        if log.incomplete:
            notes.append(f"The last line of the log is incomplete and left out: line {log.lines + 1} of {log.path}.")
        if log.unreadable:
            notes.append(left_out(log.path, "entries", log.first_unreadable, log.unreadable))
        if log.replaced:
            notes.append(f"Entries of steps that were trained again after a resume are left out: {log.replaced}.")
        if log.unknown_keys:
            notes.append("The log has more keys than a page shows.")
        for key, curve in log.curves.items():
            if steps := not_finite(curve):
                more = " and more" if len(steps) > _NAMED else ""
                notes.append(
                    f"{key} is not finite or beyond 1e100 at step {', '.join(map(str, steps[:_NAMED]))}{more}."
                )
        if not self.settings:
            notes.append(f"There is no configuration: {self.settings_from}.")
        return notes

    def content(self) -> dict[str, Any]:
        """For the page, as JSON has it."""
        log = self.log
        marks = self.marks()
        loss, validation = log.curves.get("loss"), log.curves.get("validation.loss")
        time = clock(log.curves)
        return {
            "name": self.name,
            "folder": str(self.folder),
            "step": log.last_step,
            "steps": self.steps_of_run,
            "curves": {key: plain(thin(curve)) for key, curve in log.curves.items()},
            "smoothed": {}
            if loss is None
            else {half_life: plain(thin(smooth(loss, half_life))) for half_life in half_lives(log.last_step)},
            "clock": time,
            "validation": None if validation is None else plain(validation)["value"][-1],
            "tokens": time["tokens"][-1],
            "time": format_seconds(3600 * time["hours"][-1]),
            "resumes": sum(mark.kind == "resume" for mark in marks),
            "saves": sum(mark.kind == "save" for mark in marks),
            "marks": [vars(mark) for mark in marks[-_MOST_MARKS:]],
            "notes": self.notes(),
            "settings_from": self.settings_from if self.settings else None,
        }
