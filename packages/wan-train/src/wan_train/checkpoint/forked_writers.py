"""What Core 0.16 calls to write the files of a checkpoint side by side, in forked processes that are supervised.

Import only after ``wan_train.engine.start``. Core from 0.17 on writes the files in threads.
"""

from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from wan_train.checkpoint.writer_supervision import WriterExitedError, forked_writers_supervised

_write = getattr(FileSystemWriterAsync, "write_preloaded_data_multiproc", None)


def supervise_forked_writers() -> None:
    """Make a save end with an error if one of the processes that it forks ends before its files are written."""
    if _write is not None:
        FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_forks)


def _write_in_forks(*arguments: Any) -> None:
    # A function of a module, because it is sent to the process that writes asynchronous checkpoints on CUDA.
    assert _write is not None, "it is what was replaced"
    *_, results = arguments
    try:
        with forked_writers_supervised():
            _write(*arguments)
    except WriterExitedError as error:
        results.put(error)  # as Core does with the errors that its processes tell it
