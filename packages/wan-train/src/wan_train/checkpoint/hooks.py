"""Hooks that make Megatron-Bridge's checkpoints crash-safe and free of code execution.

Import only after ``wan_train.engine.start``.

Bridge writes shards, state and tracker one after the other; after a crash in between it cannot resume, and its
retention can delete the only complete checkpoint. Here each save first deletes an incomplete checkpoint of that step
and last writes ``complete.json`` (``wan_train.checkpoint.record``); only then are older checkpoints deleted. Each load
first verifies the digest of every file, distributed over all ranks, and reads pickles with an unpickler that allows
only the classes of a checkpoint.

The hooks must not be passed by in any version of Bridge. ``wan_train.engine.upstream.checkpoints`` verifies where they
are placed; here a writer that is created outside of a save, a step that should have been saved and was not, and a
checkpoint that should have been loaded and was not end the run with an error.
"""

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from wan_model.dit.lora import is_adapter_key
from wan_model.system.files import sync_folder
from wan_model.weights.training_checkpoint import read_index
from wan_train.checkpoint.file_checks import TRAIN_STATE, check_file_contents, wrong_form_refused
from wan_train.checkpoint.folder import ResumePoint, delete_checkpoint, prune, step_folder
from wan_train.checkpoint.forked_writers import supervise_forked_writers
from wan_train.checkpoint.record import RECORD_NAME, changed_files, record_file, write_record
from wan_train.checkpoint.writer_supervision import supervise_writer
from wan_train.engine.installed import installed_versions
from wan_train.engine.torch_adam import synchronize_steps, uses_torch_adam
from wan_train.engine.upstream.checkpoints import (
    SAFE_SAVES,
    CheckpointingException,
    is_fully_sharded,
    keep_settings,
    place_hooks,
    register_safe_globals,
    restore_train_state,
    unwrap_model,
    use_read_weights,
)
from wan_train.engine.upstream.master_weights import noting_weights
from wan_train.engine.upstream.replace import changed
from wan_train.model.ema import PREFIX
from wan_train.model.provider import MegatronWanDiT

# The rank that wrote a file of the distributed format.
_WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp")


class NotSavedError(ValueError):
    """A checkpoint could not be written."""


class CheckpointHooks:
    """Saves and loads of one run.

    Args:
        point: the checkpoint that the run resumes from, or None.
    """

    def __init__(self, point: ResumePoint | None) -> None:
        self._point = point
        # The loop saves once more at its end; a checkpoint that exists already is not written again.
        self._saved = {point.step_folder} if point else set()
        self._seconds = 0.0
        self._watching = False
        self._inside_save = self._scheduled = self._loaded = self._loading_now = False
        self._writing = 0  # the step of the newest asynchronous save

    def take_seconds(self) -> float:
        """Seconds that saves have blocked the loop since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def install(self) -> None:
        """Make Megatron-Bridge's loop save and load through this object; once per process.

        Raises:
            EngineChangedError: this version of Bridge cannot be made to.
        """
        place_hooks(
            save=self._saving,
            schedule=self._scheduling,
            load=self._loading,
            # Bridge looks for its tracker files; the resume point has been resolved already.
            exists=lambda path: path is not None and self._point is not None,
            load_weights=_load_strictly,
            tracker=self._tracker,
        )
        refuse_other_writers(lambda: self._inside_save)
        supervise_forked_writers()
        read_without_code()

    @contextlib.contextmanager
    def failed_saves_explained(self, folder: Path | None) -> Iterator[None]:
        """In this context, that of the loop, an asynchronous save that fails raises ``NotSavedError``.

        Args:
            folder: the checkpoint folder.
        """
        try:
            yield
        except CheckpointException as error:  # no Exception, but a BaseException
            if folder is None or not self._writing:
                raise RuntimeError(_first_cause(error)) from error
            raise _not_saved(error, self._writing, step_folder(folder, self._writing)) from error

    def require_loaded(self) -> None:
        """Raise ``EngineChangedError`` if the run resumes and nothing was loaded; called before the first step."""
        if self._point is not None and not self._loaded:
            raise changed("its loop does not load the checkpoint by load_checkpoint", "an exact resume")

    def require_saved(self, config: Any, step: int) -> None:
        """Raise ``EngineChangedError`` if this step was not saved although it should have been.

        Args:
            config: the ``checkpoint`` section.
            step: number of completed steps.
        """
        if config.save is not None and step_folder(Path(config.save), step) not in self._saved:
            raise changed(f"its loop did not save step {step} by save_checkpoint", SAFE_SAVES)

    def require_complete(self, config: Any, step: int) -> None:
        """The same at the end of a run, when the last save must also have been completed."""
        if config.save is None or config.save_interval == 0:
            return
        self.require_saved(config, step)
        if not (step_folder(Path(config.save), step) / RECORD_NAME).is_file():
            raise changed(f"its loop did not complete the save of step {step}", SAFE_SAVES)

    def _saving(self, save: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(save)
        def save_and_finalize(state: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            config, step = state.cfg.checkpoint, state.train_state.step
            folder = step_folder(Path(config.save), step)
            if folder in self._saved:
                return
            begun = time.monotonic()
            if torch.distributed.get_rank() == 0:
                delete_checkpoint(
                    Path(config.save), step
                )  # an incomplete one of a killed run, or one after a resume from an earlier step
            torch.distributed.barrier()
            self._saved.add(folder)
            if uses_torch_adam(optimizer):
                synchronize_steps(optimizer)
            self._inside_save, self._scheduled = True, False
            try:
                save(state, model, optimizer, *args, **kwargs)
                if not config.async_save:
                    _finalize(Path(config.save), step, config.most_recent_k)
                elif not self._scheduled:
                    raise changed("save_checkpoint does not call schedule_async_save", SAFE_SAVES)
            except (CheckpointException, OSError, RuntimeError) as error:
                raise _not_saved(error, step, folder) from error
            finally:
                self._inside_save = False
            self._seconds += time.monotonic() - begun

        return save_and_finalize

    def _scheduling(self, schedule: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(schedule)
        def schedule_and_finalize(state: Any, request: Any) -> None:
            config = state.cfg.checkpoint
            # The current step: the loop continues before the request is finished.
            finish = functools.partial(_finalize, Path(config.save), state.train_state.step, config.most_recent_k)
            request.add_finalize_fn(finish)
            queue = state.async_calls_queue
            if queue.persistent and not self._watching:
                self._watching = True
                caller = queue._get_async_caller()
                supervise_writer(lambda: caller.process)
            schedule(state, request)
            self._scheduled, self._writing = True, state.train_state.step

        return schedule_and_finalize

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def verify_and_load(state: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            assert self._point is not None, "only the resolved checkpoint is loaded"
            _verify(self._point)
            check_file_contents(self._point, restore_train_state)
            # A new run from a checkpoint's weights starts a new EMA.
            has_ema = not state.cfg.checkpoint.finetune and any(
                key.startswith(PREFIX) for key in self._index().state_dict_metadata
            )
            parts = [part for part in unwrap_model(model) if isinstance(part, MegatronWanDiT)]
            for part in parts:
                part.ema_in_checkpoint = has_ema
            self._loaded = self._loading_now = True
            try:
                with (
                    wrong_form_refused(self._point, self._point.step_folder),
                    _only_weights(),
                    keep_settings(optimizer),
                    noting_weights(optimizer) as differing_weights,
                ):
                    result = load(state, model, optimizer, *args, **kwargs)
                use_read_weights(model)
                _require_one_set_of_weights(self._point, differing_weights())
                return result
            except CheckpointException as error:  # no Exception, but a BaseException
                raise ValueError(
                    f"the tensors in {self._point.step_folder} cannot be read: {_first_cause(error)}; restore it, or "
                    "delete it to resume from the checkpoint before it"
                ) from error
            except CheckpointingException as error:
                raise ValueError(
                    f"{self._point.step_folder} cannot be loaded by {installed_versions()} ({error}); "
                    "load it with the versions that it was saved with, or with newer ones"
                ) from error
            finally:
                for part in parts:
                    part.ema_in_checkpoint = True
                self._loading_now = False
                # Checkpoints of this run record its configuration, not the step it resumed from.
                state.cfg.checkpoint.ckpt_step = None

        return verify_and_load

    def _tracker(self, name_of: Callable[..., str]) -> Callable[..., str]:
        """Reading Megatron-FSDP's format, Bridge takes the step from its tracker file, not from ``ckpt_step``.

        The tracker is wrong after a crash, and that of another run's folder is not ours to correct, so the step's own
        train state stands in for it.
        """

        @functools.wraps(name_of)
        def train_state_file(folder: str, prefix: str | None = None) -> str:
            if prefix is not None and self._loading_now:
                assert self._point is not None, "only the resolved checkpoint is loaded"
                return str(self._point.step_folder / TRAIN_STATE)
            return name_of(folder, prefix)

        return train_state_file

    def _index(self) -> Metadata:
        assert self._point is not None
        return read_index(self._point.step_folder)


def _not_saved(error: BaseException, step: int, folder: Path) -> NotSavedError:
    return NotSavedError(
        f"the checkpoint of step {step} could not be written to {folder}: {_reason(error, folder)}; "
        "earlier checkpoints are unchanged, and the same command resumes from them"
    )


def _first_cause(error: CheckpointException) -> str:
    """The first rank's cause, in one line."""
    cause = next(iter(error.failures.values()))[0]
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def _reason(error: BaseException, folder: Path) -> str:
    """The operating system's error, which torch's writers drop: that of one more write to the same files."""
    probe = folder / ".probe"
    try:
        # One of the files written so far may have reached the largest size that is allowed.
        for file in (*sorted(folder.iterdir(), key=lambda file: -file.stat().st_size), probe):
            existed = file.exists()
            size = file.stat().st_size if existed else 0
            try:
                with file.open("ab") as opened:
                    opened.write(bytes(1 << 20))
            finally:
                if existed:  # without raising an error of its own in place of the one that is wanted
                    os.truncate(file, size)
    except OSError as found:
        return f"[Errno {found.errno}] {os.strerror(found.errno or 0)}"
    finally:
        probe.unlink(missing_ok=True)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: Worker failure: ") if lines else type(error).__name__


def _finalize(folder: Path, step: int, keep: int) -> None:
    """Complete a checkpoint; called on every rank when all of its files are written."""
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
        sync_folder(folder)  # the checkpoint's own name, before older ones go
        if keep > 0:
            prune(folder, keep)
    torch.distributed.barrier()


def _verify(point: ResumePoint) -> None:
    """Verify the digests, each rank those of its share of the files; if one differs, all ranks raise."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    changed = changed_files(point.step_folder, point.files, sorted(point.files)[rank::ranks])
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, changed)
    if names := sorted(name for part in gathered for name in part):
        raise ValueError(
            f"{point.step_folder / names[0]} is damaged (its SHA-256 differs from {RECORD_NAME}'s); "
            f"restore it, or delete {point.step_folder} to resume from the checkpoint before it"
        )


def _require_one_set_of_weights(point: ResumePoint, differing: int) -> None:
    """Raise ``ValueError`` on all ranks if the optimizer of one has other weights than its model."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, differing)
    if sum(gathered):
        raise ValueError(
            f"{point.step_folder} has optimizer states under the names of other parameters (of {sum(gathered)} the "
            "weights are not the model's), as earlier versions saved them with ddp.overlap_grad_reduce; begin another "
            "run from its weights: wan-train export, then --init-from"
        )


def _load_strictly(module: torch.nn.Module, state: dict[str, Any], strict: bool) -> None:
    # Bridge's own function retries without `strict`, and trains on with missing weights.
    del strict
    if not is_fully_sharded(module):
        module.load_state_dict(state)
        return
    # In bf16 it would not find its own names, because it saves without that of Megatron's precision wrapper.
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    if adapters := {key: value for key, value in own.items() if is_adapter_key(key)}:
        own = adapters  # what they adapt is not in a checkpoint
    read = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if differing := sorted(own.keys() ^ read.keys()):
        raise ValueError(f"the checkpoint has other tensors than this run, for example {differing[0]}")
    with torch.no_grad():
        for key, value in read.items():
            if own[key] is not value:
                own[key].copy_(value)


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


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """In this context ``torch.load`` reads no classes but those of a checkpoint.

    Core 0.17.0 and 0.19 read the common state with ``weights_only=False``.
    """
    load = torch.load
    torch.load = functools.wraps(load)(lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": True}))
    try:
        yield
    finally:
        torch.load = load


def refuse_other_writers(saving: Callable[[], bool]) -> None:
    """Make this process write distributed checkpoints only while ``saving`` returns True; once per process.

    Every writer of a checkpoint, Megatron's too, is a ``FileSystemWriter`` of torch.
    """
    create = FileSystemWriter.__init__

    @functools.wraps(create)
    def create_in_a_save(self: FileSystemWriter, *args: Any, **kwargs: Any) -> None:
        if not saving():
            raise changed("it writes a checkpoint outside of save_checkpoint", SAFE_SAVES)
        create(self, *args, **kwargs)

    FileSystemWriter.__init__ = create_in_a_save  # type: ignore[method-assign]


def read_without_code() -> None:
    """Make this process read distributed checkpoints without executing their content; once per process."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    register_safe_globals()
    FileSystemReader.read_metadata = _read_index  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
