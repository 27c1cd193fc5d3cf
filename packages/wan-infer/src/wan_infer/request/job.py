"""The videos of one call of the command and the files that they are written to. Imports no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from wan_infer.output.output_names import check_save_file, check_writable, file_suffix
from wan_infer.request.settings import VideoRequest


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of the command.

    Attributes:
        requests: one per video.
        fps: frames a second of the files; None for those of the data that the transformer was trained on.
        save_file: the file of the only video; None for generated names in ``output_folder``.
        output_folder: created if absent.
        contact_sheet: the file of the contact sheet, or None.
        metadata: whether files contain the prompt, the settings and the versions.
    """

    requests: Sequence[VideoRequest]
    fps: int | None
    save_file: Path | None
    output_folder: Path
    contact_sheet: Path | None
    metadata: bool

    @property
    def texts(self) -> list[str]:
        """All texts to embed, each once."""
        given = [*(request.prompt for request in self.requests), *map(_negative, self.requests)]
        return list(dict.fromkeys(text for text in given if text is not None))

    def token_record(self, index: int, counts: Mapping[str, int]) -> dict[str, int | None]:
        """The tokens of one video's texts, for the report."""
        request = self.requests[index]
        negative = _negative(request)
        return {
            "prompt_tokens": counts[request.prompt],
            "negative_prompt_tokens": None if negative is None else counts[negative],
        }

    def cut_texts(self, counts: Mapping[str, int], most: int) -> list[str]:
        """A sentence about each text that has more tokens than the model takes.

        Args:
            counts: tokens of every text.
            most: tokens that the model takes.
        """
        sentences = []
        for text in self.texts:
            if (count := counts[text]) <= most:
                continue
            prompts = [i for i, request in enumerate(self.requests, start=1) if request.prompt == text]
            negatives = [i for i, request in enumerate(self.requests, start=1) if _negative(request) == text]
            names = [
                f"the {kind} of video{'s' if len(videos) > 1 else ''} {', '.join(map(str, videos))}"
                for kind, videos in (("prompt", prompts), ("negative prompt", negatives))
                if videos
            ]
            sentences.append(f"{' and '.join(names)} has {count} tokens; the model takes {most}, the rest is cut")
        return sentences


def _negative(request: VideoRequest) -> str | None:
    """The negative prompt of a video, or None without guidance."""
    return request.settings.negative_prompt if request.settings.guidance != 1 else None


def check_outputs(job: Job) -> None:
    """Refuse files that cannot be written, before anything is loaded.

    Raises:
        ValueError: one file for several videos, a wrong suffix, or a path that cannot be written to.
    """
    if job.save_file is not None:
        if len(job.requests) > 1:
            raise ValueError(
                f"--save-file takes one video and {len(job.requests)} were asked for; use --output-folder for several"
            )
        check_save_file(job.save_file, job.requests[0].frames)
        check_writable(job.save_file)
    else:
        check_writable(job.output_folder / f"0000{file_suffix(job.requests[0].frames)}")
    if job.contact_sheet is not None:
        if job.contact_sheet.suffix.lower() != ".png":
            raise ValueError(f"cannot save the contact sheet to {job.contact_sheet}: its name must end in .png")
        check_writable(job.contact_sheet)
