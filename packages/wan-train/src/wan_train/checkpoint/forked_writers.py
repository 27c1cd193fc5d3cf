"""What Core 0.16 calls to write the files of a checkpoint side by side, in forked processes that are supervised.

Import only after ``wan_train.engine.start``, and before Core's own function is replaced. It is a function of a module,
because it is sent to the process that writes asynchronous checkpoints, which imports it.
"""

from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from wan_train.checkpoint.async_writer import forked_writers_supervised

_write = FileSystemWriterAsync.write_preloaded_data_multiproc


def write_in_forks(*arguments: Any, **options: Any) -> None:
    """Write; the arguments are those of Core's function.

    Raises:
        WriterExitedError: a process has ended before its files were written.
    """
    with forked_writers_supervised():
        _write(*arguments, **options)
