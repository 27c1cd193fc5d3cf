"""A head start for the processes that encode; imports nothing heavy itself."""

import multiprocessing.context
import multiprocessing.forkserver


def warm_up() -> multiprocessing.context.ForkServerContext:
    """Start to import what encoding processes need, in the process that they are forked from.

    They are not forked from the caller, which may have used CUDA or threads. Calling it again changes nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["wan_data.prepare.encoder_pool", "diffusers.models.autoencoders.autoencoder_kl_wan"]
    )
    multiprocessing.forkserver.ensure_running()
    return context
