"""Preloading the modules of the encoding processes; imports nothing heavy itself."""

import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import sys

_LEFT_BEHIND = "ignore::UserWarning:multiprocessing.resource_tracker"


def preload_encoders() -> multiprocessing.context.ForkServerContext:
    """Start the fork server, which imports the modules of the encoding processes before it forks them.

    The processes are not forked from the caller, which may have used CUDA or threads. Further calls have no effect.

    Returns:
        The multiprocessing context that forks from that server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "wan_data.prepare.encoding.fork_server",
            "wan_data.prepare.encoding.encoder_pool",
            "diffusers.models.autoencoders.autoencoder_kl_wan",
        ]
    )
    _start_resource_tracker()
    multiprocessing.forkserver.ensure_running()
    return context


def encoding_processes() -> list[int]:
    """The process ids of the fork server and of the processes that it has forked for this one."""
    forked = [
        process.pid
        for process in multiprocessing.active_children()
        if isinstance(process, multiprocessing.context.ForkServerProcess) and process.pid is not None
    ]
    server: int | None = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)
    return forked if server is None else [server, *forked]


def _start_resource_tracker() -> None:
    """Start the process that removes the semaphores of a command that a signal ends, without its warning about them."""
    sys.warnoptions.append(_LEFT_BEHIND)  # it gets these
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(_LEFT_BEHIND)
