"""A run ends when it should: whatever happens to a rank or to the launcher, nothing is left and the cause is named."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_runs import RUN_OPTIONS

import wan_train.launch.launcher
from wan_train.config.options import RunOptions
from wan_train.launch.launcher import launch
from wan_train.launch.supervision import Failure

# Every process of a test inherits it, whatever becomes of its parents and groups.
MARK = "WAN_TRAIN_TEST_MARK"
PATIENCE = 60.0
# What the specification allows between an event and the end of the last process.
SOON = 20.0
ARGUMENT = RunOptions("tiny").to_json()

# The launcher with other processes in place of training ones; SETTINGS shorten what it waits for.
LAUNCH = """
import sys, wan_train.launch.launcher as launch
popen = launch.subprocess.Popen
launch.subprocess.Popen = lambda command, **options: popen([sys.executable, "-c", WORKER, *command[3:]], **options)
for name, value in SETTINGS.items(): setattr(launch, name, value)
sys.exit(launch.launch(ARGUMENT, 2))
"""

# The real main module with something else in the place of training; PLACE is where ready ranks leave their numbers.
WORKER = """
import os, signal, subprocess, sys, time, types
from pathlib import Path
rank = int(os.environ["RANK"])
def ready():
    partial = Path(PLACE, f"{rank}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(Path(PLACE, str(rank)))
def join(seconds=600):
    import datetime, torch
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    torch.distributed.barrier()
    return lambda: torch.distributed.all_reduce(torch.ones(1))
def pretrain(options):
BODY
run = types.ModuleType("wan_train.loop.run")
run.pretrain = pretrain
sys.modules["wan_train.loop.run"] = run
from wan_train.launch.worker import main
if __name__ == "__main__": sys.exit(main())
"""

TRAIN = """
reduce = join()
ready()
while True: reduce()
"""
# With what a data loader and a checkpoint writer start: a fork that holds every descriptor, and another program.
LEAVE_CHILDREN = """
if os.fork() == 0: time.sleep(600)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
ready()
"""
SLEEP_WITH_CHILDREN = f"{LEAVE_CHILDREN}time.sleep(600)"


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """What a shell starts in the background ignores interrupts, and so would everything that is started here."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def worker(body: str, place: Path) -> str:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return f"PLACE = {str(place)!r}\n{WORKER.replace('BODY', lines)}"


class Job:
    """A command whose processes can all be found.

    Args:
        command: what to start.
        place: an empty folder, where ranks leave their numbers.
    """

    def __init__(self, command: list[str], place: Path, **variables: str) -> None:
        self.place, self.mark = place, uuid.uuid4().hex
        self.errors = place / "stderr"
        # Not pipes: a process that is left must not keep the test waiting.
        with (place / "stdout").open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=errors, env={**os.environ, **variables, MARK: self.mark}
            )

    def pid(self, rank: int) -> int:
        path = self.place / str(rank)
        wait_until(lambda: path.exists() or self.process.poll() is not None, f"rank {rank} is ready")
        assert path.exists(), self.errors.read_text()
        return int(path.read_text())

    def code(self) -> int:
        return self.process.wait(PATIENCE)

    def alive(self) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's; of the dead it is empty
                    if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def said(self) -> list[str]:
        return self.errors.read_text().splitlines()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s and it is not so that {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start_job(command: list[str], **variables: str) -> Job:
        jobs.append(Job(command, tmp_path, **variables))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for pid in job.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


@pytest.fixture
def start_ranks(start: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Two ranks that do as they are told, under our launcher."""

    def start_two(body: str, **settings: float) -> Job:
        program = f"WORKER, ARGUMENT, SETTINGS = {worker(body, tmp_path)!r}, {ARGUMENT!r}, {settings!r}\n{LAUNCH}"
        return start([sys.executable, "-c", program])

    return start_two


def test_ranks_find_each_other_by_torchruns_variables() -> None:
    values = wan_train.launch.launcher.environment(1, 2, 2345, {"PATH": "x"})
    assert (values["RANK"], values["WORLD_SIZE"], values["MASTER_ADDR"], values["MASTER_PORT"]) == (
        "1", "2", "127.0.0.1", "2345",
    )  # fmt: skip
    assert values["PATH"] == "x"
    assert wan_train.launch.launcher.environment(0, 2, 1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_a_failure_travels_whole() -> None:
    try:
        raise RuntimeError("two\nlines") from ValueError("ü")
    except RuntimeError as error:
        failure = Failure.of(error)
    line = failure.to_line()
    assert line.index(b"\n") == len(line) - 1
    assert Failure.from_line(line) == failure
    assert "ValueError: ü" in failure.text
    assert failure.text.endswith("RuntimeError: two\nlines")
    assert (failure.code, failure.lost_peer) == (1, False)


def test_what_follows_from_a_lost_peer_is_told_from_its_cause() -> None:
    def raised(error: Exception, cause: Exception | None = None) -> Failure:
        try:
            raise error from cause
        except Exception as caught:
            return Failure.of(caught)

    lost = RuntimeError("[x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert raised(lost).lost_peer
    assert raised(torch.distributed.DistNetworkError("The client socket has failed")).lost_peer
    assert raised(RuntimeError("the checkpoint is not whole"), lost).lost_peer
    assert not raised(RuntimeError("the checkpoint is not whole"), OSError(28, "No space left on device")).lost_peer
    assert not raised(ValueError("a sentence"), lost).lost_peer


def test_ranks_that_end_well_leave_nothing(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(LEAVE_CHILDREN)
    assert job.code() == 0
    assert job.alive() == []
    assert job.said() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_and_what_follows_is_not(
    start_ranks: Callable[..., Job], number: signal.Signals
) -> None:
    job = start_ranks(TRAIN)
    job.pid(0)
    os.kill(job.pid(1), number)
    assert job.code() == 128 + number
    assert job.alive() == []
    [line] = job.said()
    assert line.startswith(f"Error (rank 1): the process was killed by {number.name}")


def test_a_ranks_sentence_is_the_only_error(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(
        "reduce = join()\nif rank == 1: raise ValueError('step 3 is not to be had')\nwhile True: reduce()"
    )
    assert job.code() == 2
    assert job.alive() == []
    assert job.said() == ["Error (rank 1): step 3 is not to be had"]


def test_what_users_cannot_mend_is_shown_with_its_traceback(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("reduce = join()\nif rank == 0: return 1 / 0\nwhile True: reduce()")
    assert job.code() == 1
    lines = job.said()
    assert lines[:2] == ["Error (rank 0):", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert sum("Error" in line for line in lines) == 2


def test_what_every_rank_says_is_said_once(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("raise ValueError('no such recipe')")
    assert job.code() == 2
    assert job.said() == ["Error: no such recipe"]


def test_a_rank_that_only_exits_is_named(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("if rank == 1: sys.exit(5)\ntime.sleep(600)")
    assert job.code() == 5
    assert job.alive() == []
    assert job.said() == ["Error (rank 1): the process ended with exit status 5"]


def test_a_stopped_rank_ends_the_run(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(TRAIN)
    job.pid(0)
    os.kill(job.pid(1), signal.SIGSTOP)
    stopped = time.monotonic()
    assert job.code() == 1
    assert time.monotonic() - stopped < SOON
    assert job.alive() == []
    [line] = job.said()
    assert line.startswith("Error (rank 1): the process was stopped (SIGSTOP) 8 seconds ago")


def test_a_short_stop_is_forgiven(start_ranks: Callable[..., Job], tmp_path: Path) -> None:
    job = start_ranks("ready()\nwhile not Path(PLACE, 'go').exists(): time.sleep(0.01)", STOPPED_SECONDS=1.0)
    for _ in range(3):  # longer in all than is forgiven at once
        os.kill(job.pid(1), signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(job.pid(1), signal.SIGCONT)
        time.sleep(0.2)
    time.sleep(0.8)
    (tmp_path / "go").touch()
    assert job.code() == 0
    assert job.said() == []


def test_a_rank_that_hangs_is_found_by_its_peers(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("reduce = join(3)\nif rank == 1: time.sleep(600)\nreduce()")
    assert job.code() == 1
    assert job.alive() == []
    lines = job.said()
    assert lines[0] == "Error (rank 0):"
    assert lines[-1].endswith("nothing was heard of rank 1.")


@pytest.mark.parametrize("also_stopped", [False, True])
def test_nothing_outlives_a_killed_launcher(start_ranks: Callable[..., Job], also_stopped: bool) -> None:
    job = start_ranks(SLEEP_WITH_CHILDREN)
    pids = [job.pid(0), job.pid(1)]
    assert len(job.alive()) == 7  # the launcher, and three of each rank
    if also_stopped:
        os.kill(pids[1], signal.SIGSTOP)
    job.process.kill()
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_everything(start_ranks: Callable[..., Job], number: signal.Signals) -> None:
    job = start_ranks(SLEEP_WITH_CHILDREN)
    job.pid(0), job.pid(1)
    job.process.send_signal(number)
    assert job.code() == 128 + number
    assert job.alive() == []
    assert job.said() == [f"Ended by {number.name}."]


@pytest.mark.parametrize("twice", [False, True])
def test_ranks_that_will_not_end_are_killed(start_ranks: Callable[..., Job], twice: bool) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(600)"
    job = start_ranks(body, GRACE_SECONDS=600.0 if twice else 1.0)
    job.pid(0), job.pid(1)
    job.process.send_signal(signal.SIGINT)
    if twice:
        wait_until(lambda: job.said() != [], "the first is answered")
        time.sleep(0.3)
        assert len(job.alive()) == 3
        job.process.send_signal(signal.SIGINT)
    assert job.code() == 130
    assert job.alive() == []


def test_a_rank_that_cannot_start_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def once(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", once)
    with pytest.raises(BlockingIOError):
        launch("{}", 2)
    assert started[0].returncode == -signal.SIGTERM


@pytest.fixture
def start_torchrun(start: Callable[..., Job], tmp_path: Path) -> Callable[[str], Job]:
    """The same ranks under torchrun."""

    def start_two(body: str) -> Job:
        (tmp_path / "ranks.py").write_text(worker(body, tmp_path))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return start([*torchrun, str(tmp_path / "ranks.py"), ARGUMENT], PYTHONWARNINGS="ignore")

    return start_two


def test_under_torchrun_the_sentence_is_the_only_error_of_ours(start_torchrun: Callable[[str], Job]) -> None:
    job = start_torchrun(
        "reduce = join()\nif rank == 1: raise ValueError('step 3 is not to be had')\nwhile True: reduce()"
    )
    assert job.code() == 1
    assert job.alive() == []
    lines = job.said()
    assert [line for line in lines if line.startswith("Error")] == ["Error (rank 1): step 3 is not to be had"]
    assert not any("gloo" in line for line in lines)


def test_nothing_outlives_a_killed_torchrun(start_torchrun: Callable[[str], Job]) -> None:
    job = start_torchrun(SLEEP_WITH_CHILDREN)
    pids = [job.pid(0), job.pid(1)]
    os.kill(pids[1], signal.SIGSTOP)
    job.process.kill()
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)


def start_training(start: Callable[..., Job], folder: Path, *arguments: str) -> Job:
    """A real run of two ranks without an end, seen to have trained."""
    command = [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *RUN_OPTIONS]
    job = start(
        [*command, "train.train_iters=100000", "--nproc-per-node", "2", f"checkpoint.save={folder}", *arguments]
    )
    log = folder / "log.jsonl"

    def trains() -> bool:
        assert job.process.poll() is None, job.errors.read_text()
        return log.exists() and len(log.read_text().splitlines()) >= 3

    wait_until(trains, "three steps are in the log", 120)
    return job


def ranks_of(job: Job) -> list[int]:
    """The numbers of a real run's ranks, in order."""
    ranks = {}
    for pid in job.alive():
        values = dict(
            line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line
        )
        if os.getpgid(pid) == pid and "RANK" in values:
            ranks[int(values["RANK"])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def test_a_rank_killed_in_training_ends_the_run(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start_training(start, tmp_path / "run")
    pids = ranks_of(job)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert job.process.wait(SOON) == 137
    assert job.alive() == []
    assert [line for line in job.said() if "Error" in line] == [job.said()[-1]]
    assert job.said()[-1].startswith("Error (rank 1): the process was killed by SIGKILL")


def test_training_and_its_checkpoint_writers_end_with_a_killed_launcher(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    job = start_training(start, tmp_path / "run", "checkpoint.save_interval=1")
    # More than the launcher and its ranks: somebody is writing.
    wait_until(lambda: len(job.alive()) > 3, "a checkpoint is being written")
    job.process.kill()
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)
