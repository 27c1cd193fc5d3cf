"""One call of the command, from checked requests to files: models are loaded once, then video follows video."""

import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

import wan_model
from wan_infer import __version__
from wan_infer.output.output_names import output_name
from wan_infer.progress import Progress
from wan_infer.request.job import Job, Means, Sources

if TYPE_CHECKING:
    from wan_infer.sampling.sampler import WanSampler


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
        **{name: version(name) for name in ("torch", "tokenizers")},
        "python": platform.python_version(),
    }


def _make_sampler(sources: Sources, means: Means) -> "WanSampler":
    from wan_infer.runtime.parallelism import Sharing
    from wan_infer.runtime.placement import Placement
    from wan_infer.sampling.sampler import WanSampler

    shared: dict[str, Any] = {
        "device": means.device,
        "dtype": means.dtype,
        "t5_cpu": means.t5_cpu,
        "offload": means.offload,
        "revision": sources.revision,
        "text_model": sources.text_model,
        "vae_model": sources.vae_model,
        "lora": None if sources.lora is None else (sources.lora, sources.lora_scale),
        "tiles": means.tiles,
        "sharing": Sharing.join(
            Placement.choose(means.device).device, cfg_parallel=means.cfg_parallel, shard_weights=means.shard_weights
        ),
    }
    if sources.checkpoint_dir is not None:
        return WanSampler.from_training_checkpoint(
            sources.checkpoint_dir, sources.model, step=sources.checkpoint_step, ema=sources.ema, **shared
        )
    assert sources.model is not None, "checked by the command"
    return WanSampler.from_pretrained(sources.model, **shared)


def run(job: Job, sources: Sources, means: Means, task: str | None, log: TextIO) -> dict[str, Any]:
    """Make the videos; under several processes each makes this call, and the first writes the files.

    Args:
        job: what.
        sources: of what.
        means: by what.
        task: a released model that the transformer must be, or None.
        log: where progress goes.

    Returns:
        JSON values: the videos with their files and records, where the model came from, seconds by stage, peak memory.

    Raises:
        ValueError: anything that stands in the way, as one sentence.
    """
    stages, progress, start = _Stages(), Progress(log), time.monotonic()
    progress.say("loading the model")
    with stages.timed("load"):
        from wan_infer.loading.sources import check_task
        from wan_infer.runtime.memory import peak_memory

        sampler = _make_sampler(sources, means)
        source = sampler.source
        if task is not None:
            check_task(task, source.config, source.origin)
        for shot in job.shots:
            sampler.spec.latent_shape(shot.request.frames, shot.request.height, shot.request.width)
    with stages.timed("text"):
        sampler.embed(job.texts)
        # Its memory is the transformer's now.
        sampler.release_text()
    with stages.timed("load"):
        device = sampler.model.patch_embedding.weight.device
        sampler.codec  # noqa: B018  what is damaged is to be found before hours of work
    step = f", step {source.step}" if source.step is not None else ""
    progress.say(f"loaded {source.origin}{step} on {device} in {stages.seconds['load']:.1f} s")

    made = [_make(sampler, job, index, stages, progress) for index in range(len(job.shots))]
    if job.contact_sheet is not None and sampler.sharing.rank == 0:
        from wan_infer.output.contact_sheet import save_contact_sheet

        save_contact_sheet([np.stack(video.shown) for video in made], job.contact_sheet)
    peak = sampler.sharing.largest(peak_memory(sampler.placement.device))
    sampler.sharing.leave()
    return {
        "videos": [{"file": str(video.path), **video.record} for video in made],
        "contact_sheet": str(job.contact_sheet) if job.contact_sheet else None,
        "device": str(sampler.placement.device),
        "processes": sampler.sharing.ranks,
        "versions": _versions(),
        "seconds": {**stages.seconds, "total": time.monotonic() - start},
        "peak_memory_bytes": peak,
    }


@dataclasses.dataclass
class _Made:
    """A video that was made, and its frames for the contact sheet."""

    path: Path
    record: dict[str, Any]
    shown: list["np.ndarray"]


def _make(sampler: "WanSampler", job: Job, index: int, stages: _Stages, progress: Progress) -> _Made:
    from wan_infer.output.contact_sheet import chosen_frames
    from wan_infer.output.video_file import to_frames, write_video

    request, settings = job.shots[index].request, job.shots[index].settings
    # All that defines the video, and with it the file's name.
    record = {
        **dataclasses.asdict(request),
        **dataclasses.asdict(settings),
        "fps": job.fps,
        "dtype": str(sampler.placement.dtype).removeprefix("torch."),
        "transformer": sampler.source.origin,
        "checkpoint_step": sampler.source.step,
        "ema": sampler.source.ema,
        "lora": sampler.lora_record,
        "latent_space": sampler.spec.fingerprint,
    }
    path = job.save_file or job.output_folder / output_name(index, record, request.frames)
    progress.start(f"video {index + 1}/{len(job.shots)}")
    with stages.timed("denoise"):
        (latents,) = sampler.sample_latents(
            [request.prompt],
            width=request.width,
            height=request.height,
            frames=request.frames,
            seed=request.seed,
            settings=settings,
            on_step=progress.step,
        )
    made = _Made(path, record, [])
    wanted = set(chosen_frames(request.frames)) if job.contact_sheet is not None else set()

    def pieces() -> Iterator[Any]:
        done = 0
        decoded = sampler.decode_frames(latents)
        while True:
            with stages.timed("decode"):
                piece = next(decoded, None)
            if piece is None:
                return
            frames = to_frames(piece)
            made.shown.extend(frame for place, frame in enumerate(frames, start=done) if place in wanted)
            done += len(frames)
            yield frames

    if sampler.sharing.rank == 0:
        metadata = {**record, "versions": _versions()} if job.metadata else None
        before, begun = stages.seconds["decode"], time.monotonic()
        write_video(pieces(), request.frames, path, fps=job.fps, metadata=metadata)
        stages.seconds["write"] += time.monotonic() - begun - (stages.seconds["decode"] - before)
    else:
        for _ in sampler.decode_frames(latents):
            pass
    return made
