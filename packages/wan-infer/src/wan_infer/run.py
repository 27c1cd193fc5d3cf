"""One call of the command, from checked requests to files: models are loaded once, then video follows video."""

import dataclasses
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import wan_model
from wan_infer import __version__
from wan_infer.output_names import check_save_file, check_writable, ending, output_name
from wan_infer.progress import Progress
from wan_infer.requests import Settings, VideoRequest


@dataclasses.dataclass(frozen=True)
class Job:
    """What one call makes.

    Attributes:
        requests: the videos.
        settings: how they are sampled.
        fps: frames a second of the files.
        save_file: where the only video goes; None for names of our own in ``output_folder``.
        output_folder: made if absent.
        contact_sheet: where frames of all videos go, or None.
        metadata: whether files say how they were made.
    """

    requests: Sequence[VideoRequest]
    settings: Settings
    fps: int
    save_file: Path | None
    output_folder: Path
    contact_sheet: Path | None
    metadata: bool


def check_outputs(job: Job) -> None:
    """Refuse what cannot be written, before anything is loaded.

    Raises:
        ValueError: one file for several videos, a wrong ending, or a place that cannot be written to.
    """
    if job.save_file is not None:
        if len(job.requests) > 1:
            raise ValueError(
                f"--save-file takes one video and {len(job.requests)} were asked for; use --output-folder for several"
            )
        check_save_file(job.save_file, job.requests[0].frames)
        check_writable(job.save_file)
    else:
        check_writable(job.output_folder / f"0000{ending(job.requests[0].frames)}")
    if job.contact_sheet is not None:
        if job.contact_sheet.suffix.lower() != ".png":
            raise ValueError(f"cannot save the contact sheet to {job.contact_sheet}: its name must end in .png")
        check_writable(job.contact_sheet)


class _Stages:
    """Seconds spent by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "text", "denoise", "decode", "write"), 0.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - start


def _versions() -> dict[str, str]:
    return {
        "wan-infer": __version__,
        "wan-model": wan_model.__version__,
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "python": platform.python_version(),
    }


def _load(sources: Mapping[str, Any], placement: Mapping[str, Any]) -> Any:
    from wan_infer.sampler import WanSampler

    shared = {name: sources[name] for name in ("revision", "text_model", "vae_model")} | dict(placement)
    if sources["checkpoint_dir"] is None:
        return WanSampler.from_pretrained(sources["model"], **shared)
    return WanSampler.from_training_checkpoint(
        sources["checkpoint_dir"], sources["model"], step=sources["checkpoint_step"], **shared
    )


def run(
    job: Job, sources: Mapping[str, Any], placement: Mapping[str, Any], task: str | None, log: TextIO
) -> dict[str, Any]:
    """Make the videos.

    Args:
        job: what.
        sources: model, revision, checkpoint_dir, checkpoint_step, text_model, vae_model.
        placement: device, dtype, t5_cpu, offload; see ``placement.Placement.choose``.
        task: a released model that the transformer must be, or None.
        log: where progress goes.

    Returns:
        JSON values: the videos with their files and records, where the model came from, seconds by stage.

    Raises:
        ValueError: anything that stands in the way, as one sentence.
    """
    stages, progress, start = _Stages(), Progress(log), time.monotonic()
    progress.say("loading the model")
    with stages.timed("load"):
        from wan_infer.contact_sheet import save_contact_sheet
        from wan_infer.sources import check_task
        from wan_infer.video_file import save_video, to_frames

        sampler = _load(sources, placement)
        if task is not None:
            check_task(task, sampler.model.config, sampler.transformer.origin)
    transformer, spec, settings = sampler.transformer, sampler.codec.spec, job.settings
    step = f", step {transformer.step}" if transformer.step is not None else ""
    progress.say(f"loaded {transformer.origin}{step} on {sampler.placement.device} in {stages.seconds['load']:.1f} s")
    for request in job.requests:
        spec.latent_shape(request.frames, request.height, request.width)
    with stages.timed("text"):
        negative = [settings.negative_prompt] if settings.guidance != 1 else []
        sampler.embed([*(request.prompt for request in job.requests), *negative])

    made, videos = [], []
    for index, request in enumerate(job.requests):
        # All that defines the video, and with it the file's name.
        record = {
            **dataclasses.asdict(request),
            **dataclasses.asdict(settings),
            "fps": job.fps,
            "dtype": str(sampler.placement.dtype).removeprefix("torch."),
            "transformer": transformer.origin,
            "checkpoint_step": transformer.step,
            "latent_space": spec.fingerprint,
        }
        path = job.save_file or job.output_folder / output_name(index, record, request.frames)
        progress.start(f"video {index + 1}/{len(job.requests)}")
        with stages.timed("denoise"):
            latents = sampler.sample_latents(
                [request.prompt],
                width=request.width,
                height=request.height,
                frames=request.frames,
                seed=request.seed,
                settings=settings,
                on_step=progress.step,
            )
        with stages.timed("decode"):
            video = sampler.decode(latents)[0]
        with stages.timed("write"):
            metadata = {**record, "versions": _versions()} if job.metadata else None
            save_video(video, path, fps=job.fps, metadata=metadata)
        if job.contact_sheet is not None:
            videos.append(to_frames(video))
        made.append({"file": str(path), **record})
    if job.contact_sheet is not None:
        save_contact_sheet(videos, job.contact_sheet)
    return {
        "videos": made,
        "contact_sheet": str(job.contact_sheet) if job.contact_sheet else None,
        "device": str(sampler.placement.device),
        "versions": _versions(),
        "seconds": {**stages.seconds, "total": time.monotonic() - start},
    }
