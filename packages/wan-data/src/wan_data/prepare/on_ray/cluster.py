"""The Ray cluster of a preparation: one that is there, or one of its own on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from wan_data.prepare.on_ray.layout import make_layout
from wan_data.prepare.report import Report
from wan_data.prepare.workers import StartWorkers, Work, Workers
from wan_model.extras import requires_extra
from wan_model.system.torchrun import processors, world_size

_CONNECT_SECONDS = 10.0
_TOKENS = "RAY_AUTH_MODE"


def ray_workers(
    address: str | None = None, *, device: str = "auto", processes: int | None = None, decoders: int | None = None
) -> StartWorkers:
    """The workers of a preparation on a Ray cluster, for ``wan_data.prepare.run.prepare``.

    Args:
        address: of the cluster; that in the environment variable RAY_ADDRESS if None, or a new cluster on this machine.
        device: ``auto``, ``cpu`` or ``cuda``.
        processes: number of encoding actors; one for each GPU of the cluster if None, or for each node without GPUs.
        decoders: number of probing, and later of decoding actors; one for each processor of the cluster if None.

    Raises:
        ValueError: Ray is not installed, or torchrun has started this process; and when the workers start, there is no
            cluster at the address, one cannot be started with this folder for temporary files, or the device is not
            there.
    """
    if world_size() > 1:
        raise ValueError("--on ray distributes the work itself; run the command once, without torchrun")
    with requires_extra("ray", "wan-data"):
        import ray

        del ray

    @contextlib.contextmanager
    def start(work: Work) -> Iterator[Workers]:
        import ray

        from wan_data.prepare.on_ray.ray_workers import RayWorkers

        with _connected(address or os.environ.get("RAY_ADDRESS") or None, work.report):
            nodes = sum(node["Alive"] for node in ray.nodes())
            layout = make_layout(ray.cluster_resources(), nodes, device, processes, decoders)
            with RayWorkers(work, layout) as workers:
                yield workers

    return start


@contextlib.contextmanager
def _connected(address: str | None, report: Report) -> Iterator[None]:
    """Connect to a cluster, or start one; nothing if this process is connected already."""
    import ray

    if ray.is_initialized():
        yield
        return
    check_address(address)
    own = address in (None, "local")
    if own:
        _check_temporary_folder()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns of its defaults, such as tokens
    handler = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(
            "local" if own else address,
            num_cpus=processors() if own else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"there is no Ray cluster at {address or 'this machine'} that this machine is a node of ({reason}); start "
            f"one with ray start, or leave --ray-address out{_about_tokens(address)}"
        ) from error
    finally:
        # Ray's own would end this process with another exit code than other commands have.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    try:
        report.log(f"Ray cluster at {context.address_info['gcs_address']}{_dashboard(context.dashboard_url)}")
        yield
    finally:
        ray.shutdown()


def check_address(address: str | None) -> None:
    """Refuse an address that the command cannot work with.

    Raises:
        ValueError: it is one of Ray Client, or nothing answers there.
    """
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"{address} is an address of Ray Client, through which frames would pass; run the command on a node of the "
            "cluster, and pass --ray-address auto"
        )
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():  # Ray itself would try for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"nothing answers at {address} ({getattr(error, 'strerror', None) or error}); start a Ray cluster "
                "there with ray start --head, or leave --ray-address out"
            ) from None


def _check_temporary_folder() -> None:
    """Refuse one in the virtual environment: Ray's workers end there as soon as they start, and it waits for them."""
    environment = os.environ.get("VIRTUAL_ENV")
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    if environment and name and Path(os.environ[name]).resolve().is_relative_to(Path(environment).resolve()):
        raise ValueError(
            f"{name} is {os.environ[name]}, in the virtual environment, where Ray starts no workers; set it to another "
            "folder"
        )


def _about_tokens(address: str | None) -> str:
    """What else may be wrong: of addresses that are given Ray sends a token only if it is told to."""
    if address in (None, "local", "auto") or _TOKENS in os.environ:
        return ""
    return f"; a cluster that takes calls with a token only is found by --ray-address auto, or with {_TOKENS}=token"


def _dashboard(url: str | None) -> str:
    return f", dashboard at http://{url}" if url else ""
