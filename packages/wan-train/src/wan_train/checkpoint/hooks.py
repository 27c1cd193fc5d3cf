"""Megatron-Bridge's saving and loading, made crash-safe and closed to code.

Import only after ``wan_train.engine.start``.

Bridge 0.3 writes shards, state and tracker one after the other; a crash between them leaves what it cannot resume, and
its cleaning can delete the only checkpoint that is whole. Here each save begins by taking away what a former one left
of that step and ends with ``complete.json`` (``wan_train.checkpoint.record``); only then are older ones deleted. Each
load begins by comparing every file with its digest, the work shared by all ranks, and reads pickles with an unpickler
that knows nothing but what a checkpoint needs.
"""

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.bridge.training.checkpointing as bridge
import megatron.bridge.training.pretrain as bridge_pretrain
import megatron.bridge.training.setup as bridge_setup
import megatron.bridge.training.train as bridge_train
import torch
from megatron.core.safe_globals import register_safe_globals
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from wan_model.system.files import write_bytes
from wan_model.weights.training_checkpoint import read_index
from wan_train.checkpoint.folder import ResumePoint, discard, prune, step_folder
from wan_train.checkpoint.record import RECORD_NAME, changed_files, record_file, write_record
from wan_train.checkpoint.writer_watch import watch_writer
from wan_train.engine.torch_adam import agree_on_steps, uses_torch_adam
from wan_train.model.ema import PREFIX
from wan_train.model.provider import MegatronWanDiT

# Which rank wrote a file of the distributed format.
_WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp")
_STATE, _TRACKERS = "train_state.pt", ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


class NotSavedError(ValueError):
    """A checkpoint that could not be written."""


class Checkpointing:
    """What happens around the saves and loads of one run.

    Args:
        point: what the run resumes from, or None.
    """

    def __init__(self, point: ResumePoint | None) -> None:
        self._point = point
        # The loop saves once more when it ends; what is on the disk already is not written again.
        self._present = {point.step_folder} if point else set()
        self._paused = 0.0
        self._watching = False

    def take_pause(self) -> float:
        """Seconds for which saving has kept the loop waiting since the last call."""
        paused, self._paused = self._paused, 0.0
        return paused

    def install(self) -> None:
        """Have Megatron-Bridge's loop save and load through this object; once a process."""
        save = self._saving(bridge.save_checkpoint)
        bridge_train.save_checkpoint = bridge_pretrain.save_checkpoint = save
        bridge.schedule_async_save = self._scheduling(bridge.schedule_async_save)
        bridge.cleanup_old_non_persistent_checkpoint = lambda *args, **kwargs: None
        bridge_setup.load_checkpoint = self._loading(bridge_setup.load_checkpoint)
        # Bridge looks for its trackers; whether there is something to load was found out before.
        bridge_setup.checkpoint_exists = lambda path: path is not None and self._point is not None
        bridge._load_model_state_dict = _load_strictly
        read_without_code()

    def _saving(self, save: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(save)
        def save_whole(state: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            config, step = state.cfg.checkpoint, state.train_state.step
            folder = step_folder(Path(config.save), step)
            if folder in self._present:
                return
            begun = time.monotonic()
            if torch.distributed.get_rank() == 0:
                discard(Path(config.save), step)  # what a run left that was killed, or that went on from before it
            torch.distributed.barrier()
            self._present.add(folder)
            if uses_torch_adam(optimizer):
                agree_on_steps(optimizer)
            try:
                save(state, model, optimizer, *args, **kwargs)
                if not config.async_save:
                    _complete(Path(config.save), step, config.most_recent_k)
            except (CheckpointException, OSError, RuntimeError) as error:
                raise NotSavedError(
                    f"the checkpoint of step {step} could not be written to {folder}: {_reason(error, folder)}; "
                    "what was saved before is untouched, and the same command goes on from there"
                ) from error
            self._paused += time.monotonic() - begun

        return save_whole

    def _scheduling(self, schedule: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(schedule)
        def schedule_whole(state: Any, request: Any) -> None:
            config = state.cfg.checkpoint
            # The step of now: the loop goes on before the request is finished.
            finish = functools.partial(_complete, Path(config.save), state.train_state.step, config.most_recent_k)
            request.add_finalize_fn(finish)
            queue = state.async_calls_queue
            if queue.persistent and not self._watching:
                self._watching = True
                caller = queue._get_async_caller()
                watch_writer(lambda: caller.process)
            schedule(state, request)

        return schedule_whole

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_whole(state: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            assert self._point is not None, "nothing is loaded that was not looked for"
            _compare(self._point)
            if torch.distributed.get_rank() == 0:
                _point_trackers(self._point)
            torch.distributed.barrier()
            # Who begins anew from a checkpoint's weights begins a new average too.
            has_average = not state.cfg.checkpoint.finetune and any(
                key.startswith(PREFIX) for key in self._index().state_dict_metadata
            )
            parts = [part for part in unwrap_model(model) if isinstance(part, MegatronWanDiT)]
            for part in parts:
                part.average_in_checkpoint = has_average
            try:
                return load(state, model, *args, **kwargs)
            finally:
                for part in parts:
                    part.average_in_checkpoint = True
                # The checkpoints of this run are to record its configuration, not where it went on.
                state.cfg.checkpoint.ckpt_step = None

        return load_whole

    def _index(self) -> Metadata:
        assert self._point is not None
        return read_index(self._point.step_folder)


def _reason(error: BaseException, folder: Path) -> str:
    """The system's word for it, which torch's writers lose: what they meet who write on where it failed."""
    probe = folder / ".probe"
    try:
        # Of files that could be written so far, one may be as large as a file can be.
        for file in (*sorted(folder.iterdir(), key=lambda file: -file.stat().st_size), probe):
            existed = file.exists()
            size = file.stat().st_size if existed else 0
            try:
                with file.open("ab") as opened:
                    opened.write(bytes(1 << 20))
            finally:
                if existed:  # or an error of its own would stand for the one that is looked for
                    os.truncate(file, size)
    except OSError as found:
        return f"[Errno {found.errno}] {os.strerror(found.errno or 0)}"
    finally:
        probe.unlink(missing_ok=True)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _complete(folder: Path, step: int, keep: int) -> None:
    """Called on every rank when all of a checkpoint's files are written."""
    path, rank = step_folder(folder, step), torch.distributed.get_rank()
    mine = {}
    for file in sorted(path.iterdir()):
        match = _WRITTEN_BY.fullmatch(file.name)
        if (int(match[1]) if match else 0) == rank:
            mine[file.name] = record_file(file)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    if rank == 0:
        write_record(path, step, {name: record for part in gathered for name, record in part.items()})
        if keep > 0:
            prune(folder, keep)
    torch.distributed.barrier()


def _compare(point: ResumePoint) -> None:
    """Every rank reads its share of the files; all of them raise where one has changed."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    changed = changed_files(point.step_folder, point.files, sorted(point.files)[rank::ranks])
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, changed)
    if names := sorted(name for part in gathered for name in part):
        raise ValueError(
            f"{point.step_folder / names[0]} is not what was saved (its sha256 differs from {RECORD_NAME}'s); "
            f"restore it, or delete {point.step_folder} to go on from the checkpoint before it"
        )


def _point_trackers(point: ResumePoint) -> None:
    # Parts of Bridge read its trackers and not the step that it is told; they are to agree.
    for name, content in zip(
        _TRACKERS, ((point.step_folder / _STATE).read_bytes(), str(point.step).encode()), strict=True
    ):
        path = point.folder / name
        if path.is_file() and path.read_bytes() == content:
            continue
        write_bytes(path, content)


def _load_strictly(module: torch.nn.Module, state: dict[str, Any], strict: bool) -> None:
    # Bridge's own tries again without `strict`, and trains on with what it could not load.
    del strict
    module.load_state_dict(state)


def _read_index(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    index = read_index(Path(self.path))
    index.storage_meta = StorageMeta(load_id=self.load_id)
    return index


def _load_bytes(self: DefaultLoadPlanner, read_item: Any, value: Any) -> None:
    key = read_item.dest_index.fqn
    loaded = torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def read_without_code() -> None:
    """Have this process read distributed checkpoints without running what they contain; once a process."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    register_safe_globals()
    FileSystemReader.read_metadata = _read_index  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
