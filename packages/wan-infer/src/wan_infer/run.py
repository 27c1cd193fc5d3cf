"""One run of the command, from checked requests to files: models are loaded once for all videos."""

import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

import wan_model
from wan_infer import __version__
from wan_infer.output.output_names import output_name
from wan_infer.progress import Progress
from wan_infer.request.job import Job
from wan_infer.request.options import ComputeOptions, ModelSources, ParallelOptions

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


def run(
    job: Job,
    sources: ModelSources,
    options: ComputeOptions,
    parallel: ParallelOptions,
    task: str | None,
    log: TextIO,
) -> dict[str, Any]:
    """Generate the videos; every process makes this call, and rank 0 writes the files.

    Args:
        job: the videos and their files.
        sources: of the models.
        options: devices, precision and memory.
        parallel: how several processes divide the work.
        task: a released model whose shape the transformer must have, or None.
        log: stream of the progress.

    Returns:
        JSON values: the videos with their files and records, seconds by stage, versions, peak memory.

    Raises:
        ValueError: the videos cannot be generated or written; the message is one sentence.
    """
    stages, progress, start = _Stages(), Progress(log), time.monotonic()
    progress.line("loading the model")
    with stages.timed("load"):
        from wan_infer.loading.sources import check_task
        from wan_infer.runtime.parallelism import Parallelism
        from wan_infer.runtime.placement import Placement
        from wan_infer.sampling.sampler import WanSampler
        from wan_model.system.memory import peak_memory

        parallelism = Parallelism.initialize(Placement.choose(options).device, parallel)
        sampler = WanSampler(sources, options, parallelism=parallelism)
        source = sampler.source
        if task is not None:
            check_task(task, source.config, source.origin)
        for request in job.requests:
            sampler.spec.latent_shape(request.frames, request.height, request.width)
    with stages.timed("text"):
        sampler.embed(job.texts)
        for sentence in job.cut_texts(sampler.token_counts, sampler.spec.text_length):
            progress.line(f"Warning: {sentence}")
        sampler.release_text()  # before the transformer is loaded
    with stages.timed("load"):
        device = sampler.model.patch_embedding.weight.device
        sampler.codec  # noqa: B018  a damaged file is refused before the videos are sampled
        if parallelism.rank == 0:
            for sentence in sampler.foreign_loras():
                progress.line(f"Warning: {sentence}")
    step = f", step {source.step}" if source.step is not None else ""
    lora = f" with {sampler.lora_record}" if sampler.lora_record else ""
    progress.line(f"loaded {source.origin}{step}{lora} on {device} in {stages.seconds['load']:.1f} s")

    fps = _frame_rate(job, sampler.spec.frame_rate, progress)
    made = [_make(sampler, job, index, fps, options.vae_dtype, stages, progress) for index in range(len(job.requests))]
    if job.contact_sheet is not None and parallelism.rank == 0:
        from wan_infer.output.contact_sheet import save_contact_sheet

        save_contact_sheet([np.stack(video.shown) for video in made], job.contact_sheet)
        progress.line(f"contact sheet: {job.contact_sheet}")
    peak = parallelism.max(peak_memory(sampler.placement.device))
    parallelism.close()
    return {
        "videos": [
            {"file": str(video.path), **video.record, **job.token_record(index, sampler.token_counts)}
            for index, video in enumerate(made)
        ],
        "text_length": sampler.spec.text_length,
        "contact_sheet": str(job.contact_sheet) if job.contact_sheet else None,
        "device": str(sampler.placement.device),
        "processes": parallelism.world_size,
        "versions": _versions(),
        "seconds": {**stages.seconds, "total": time.monotonic() - start},
        "peak_memory_bytes": peak,
    }


def _frame_rate(job: Job, trained: Fraction | None, progress: Progress) -> int | Fraction:
    """Frames a second of the files."""
    from wan_model.codec.video_encoding import FPS

    if job.fps is None:
        # The encoder takes 32 bits; 24000/1001 and the like are exact.
        return FPS if trained is None else trained.limit_denominator(10**6)
    if trained not in (None, job.fps):
        progress.line(
            f"Warning: --fps is {job.fps} and the transformer was trained on {trained} frames a second; "
            "leave --fps out for videos of natural speed"
        )
    return job.fps


@dataclasses.dataclass
class _Made:
    """A written video, and its frames for the contact sheet."""

    path: Path
    record: dict[str, Any]
    shown: list["np.ndarray"]


def _make(
    sampler: "WanSampler",
    job: Job,
    index: int,
    fps: int | Fraction,
    vae_dtype: str,
    stages: _Stages,
    progress: Progress,
) -> _Made:
    from wan_infer.output.contact_sheet import chosen_frames
    from wan_infer.output.video_file import write_video
    from wan_model.codec.video_encoding import to_frames

    request = job.requests[index]
    fields = dataclasses.asdict(request)
    settings, lora_scales = fields.pop("settings"), fields.pop("lora_scales")
    # Everything that defines the video; generated names contain its digest.
    record = {
        **fields,
        **settings,
        "fps": int(fps) if fps.denominator == 1 else float(fps),
        "dtype": str(sampler.placement.dtype).removeprefix("torch."),
        "vae_dtype": vae_dtype,
        "transformer": sampler.source.origin,
        "checkpoint_step": sampler.source.step,
        "ema": sampler.source.ema,
        "lora": sampler.describe_loras(lora_scales),
        "lora_mode": sampler.lora_mode if sampler.lora_record else None,
        "latent_space": sampler.spec.fingerprint,
    }
    path = job.save_file or job.output_folder / output_name(index, record, request.frames)
    progress.start(f"video {index + 1}/{len(job.requests)}")
    with stages.timed("denoise"):
        (latents,) = sampler.sample_latents(
            [request.prompt],
            width=request.width,
            height=request.height,
            frames=request.frames,
            seed=request.seed,
            settings=request.settings,
            lora_scale=request.lora_scales,
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

    if sampler.parallelism.rank == 0:
        metadata = {**record, "versions": _versions()} if job.metadata else None
        before, begun = stages.seconds["decode"], time.monotonic()
        write_video(pieces(), request.frames, path, fps=fps, metadata=metadata)
        stages.seconds["write"] += time.monotonic() - begun - (stages.seconds["decode"] - before)
    else:
        for _ in sampler.decode_frames(latents):
            pass
    return made
