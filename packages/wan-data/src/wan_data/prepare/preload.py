"""Preloading the modules of the encoding processes; imports nothing heavy itself."""

import multiprocessing.context
import multiprocessing.forkserver


def preload_encoders() -> multiprocessing.context.ForkServerContext:
    """Start the fork server, which imports the modules of the encoding processes before it forks them.

    The processes are not forked from the caller, which may have used CUDA or threads. Further calls have no effect.

    Returns:
        The multiprocessing context that forks from that server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["wan_data.prepare.encoder_pool", "diffusers.models.autoencoders.autoencoder_kl_wan"]
    )
    multiprocessing.forkserver.ensure_running()
    return context
