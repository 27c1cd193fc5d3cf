"""A run ends when it should: whatever happens to a rank or to the launcher, nothing is left and the cause is named.

The reasons why torch's own agent is not used, in the order in which ``wan_model.system.launcher`` gives them, by test:

| reason | test |
|---|---|
| the cause, not its consequence | ``test_the_cause_is_shown_although_what_follows_from_it_came_first`` |
| a stopped rank | ``test_a_stopped_rank_ends_the_run``; torch: ``test_torch_does_not_notice_a_stopped_rank`` |
| no folder for temporary files | ``test_only_the_error_of_a_silent_rank_is_shown_and_it_needs_no_space_on_a_disk`` |
| SIGTERM to the rank alone, then to its children | ``test_an_interrupt_ends_everything`` |
| ranks that ignore SIGTERM | ``test_ranks_that_will_not_end_are_killed`` |
| nothing outlives the launcher, or a rank that cannot start | ``test_nothing_outlives_a_killed_launcher``, |
| | ``test_a_rank_that_cannot_start_leaves_none`` |
| arguments as they are | ``test_arguments_reach_the_ranks_as_they_are``; torch: |
| | ``test_torchs_agent_replaces_parts_of_arguments`` |
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.utils import macros

from wan_model.system import launcher
from wan_model.system.child_process import Failure
from wan_model.testing.processes import Job, LaunchServer, wait_until, write_forbidden_modules

# What the specification allows between an event and the end of the last process.
SOON = 20.0

# A rank that does what BODY says; PLACE is where ready ranks leave their numbers.
RANKS = """
import os, signal, subprocess, sys, time, warnings
from pathlib import Path
from wan_model.system.child_process import Supervisor, end_process
rank = int(os.environ["RANK"])
def ready():
    partial = Path(PLACE, f"{rank}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(Path(PLACE, str(rank)))
def until(condition):
    while not condition(): time.sleep(0.01)
def meet():
    ready()
    until(lambda: all(Path(PLACE, str(other)).exists() for other in range(2)))
def join():
    import torch
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    return lambda group=None: torch.distributed.all_reduce(torch.ones(1), group=group)
def run():
BODY
def main():
    supervisor = Supervisor.find()
    supervisor.follow()
    try: run()
    except Exception as error: return supervisor.record(error)
    return 0
if __name__ == "__main__": end_process(main())
"""

TRAIN = """
reduce = join()
ready()
while True: reduce()
"""
# With what a data loader and a checkpoint writer start: a fork that holds every descriptor, and another program; and a
# service, in a session of its own.
LEAVE_CHILDREN = """
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 prints one at a fork of a process with threads
if os.fork() == 0: time.sleep(600)
sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
for own in (False, True): subprocess.Popen(sleeping, start_new_session=own)
ready()
"""
SLEEP_WITH_CHILDREN = f"{LEAVE_CHILDREN}time.sleep(600)"
# Where no other rank fails.
QUICK = {"_SETTLE_SECONDS": 0.1}
PROMPT = "a $$5 note, ${local_rank} and $local_rank, 100 % {rank} 'quoted'"
# The state of another rank's process, in a rank.
STATE_OF = "Path('/proc', Path(PLACE, '{}').read_text(), 'stat').read_text().split()[2]"
# As gloo says it.
LOST_PEER = "raise RuntimeError('[x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer')"


# What a test and its ranks write, where nothing else may be left.
OUR_FILES = {"0", "1", "__pycache__", "ranks.py", "stderr", "stdout"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_ranks(body: str, place: Path) -> Path:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    path = place / "ranks.py"
    path.write_text(f"PLACE = {str(place)!r}\n{RANKS.replace('BODY', lines)}")
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[LaunchServer]:
    server = LaunchServer()
    yield server
    server.close()


@pytest.fixture
def start_ranks(server: LaunchServer, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Two ranks that do as they are told, under our launcher."""
    jobs: list[Job] = []

    def start_two(body: str, ignored: Sequence[int] = (), **settings: float) -> Job:
        write_ranks(body, tmp_path)
        jobs.append(server.start("ranks", tmp_path, settings=settings, ignored=ignored, TMPDIR=str(tmp_path)))
        return jobs[-1]

    yield start_two
    for job in jobs:
        job.end()


def test_ranks_find_each_other_by_torchruns_variables() -> None:
    values = launcher.environment(1, 2, 2345, {"PATH": "x"})
    assert (values["RANK"], values["WORLD_SIZE"], values["MASTER_ADDR"], values["MASTER_PORT"]) == (
        "1", "2", "127.0.0.1", "2345",
    )  # fmt: skip
    assert values["PATH"] == "x"
    assert launcher.environment(0, 2, 1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_ranks_that_end_well_leave_nothing(start_ranks: Callable[..., Job], tmp_path: Path) -> None:
    job = start_ranks(LEAVE_CHILDREN)
    assert job.code() == 0
    assert job.alive() == []
    assert job.error_lines() == []
    assert names_in(tmp_path) <= OUR_FILES


def test_a_killed_rank_is_named_and_what_follows_in_gloo_is_not(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(TRAIN)
    job.pid(0)
    os.kill(job.pid(1), signal.SIGSEGV)
    assert job.code() == 128 + signal.SIGSEGV
    assert job.alive() == []
    assert job.error_lines() == ["Error (rank 1): the process was killed by SIGSEGV"]


def test_a_rank_killed_for_memory_is_named_and_what_follows_is_not(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(f"meet()\nif rank == 1: time.sleep(600)\nuntil(lambda: {STATE_OF.format(1)} == 'Z')\n{LOST_PEER}")
    job.pid(0)
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.code() == 128 + signal.SIGKILL
    assert job.alive() == []
    [line] = job.error_lines()
    assert line == "Error (rank 1): the process was killed by SIGKILL; the system does so where memory runs out"


def test_a_ranks_sentence_is_the_only_error(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("meet()\nif rank == 1: raise ValueError('step 3 is not to be had')\ntime.sleep(600)", **QUICK)
    assert job.code() == 2
    assert job.alive() == []
    assert job.error_lines() == ["Error (rank 1): step 3 is not to be had"]


def test_the_cause_is_shown_although_what_follows_from_it_came_first(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks(
        f"meet()\nif rank == 0: {LOST_PEER}\nuntil(lambda: {STATE_OF.format(0)} == 'Z')\nraise ValueError('no step 3')"
    )
    assert job.code() == 2
    assert job.error_lines() == ["Error (rank 1): no step 3"]


def test_what_users_cannot_mend_is_shown_with_its_traceback(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("if rank == 0: return 1 / 0\ntime.sleep(600)", **QUICK)
    assert job.code() == 1
    lines = job.error_lines()
    assert lines[:2] == ["Error (rank 0):", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert sum("Error" in line for line in lines) == 2


def test_what_every_rank_says_is_said_once(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("meet()\nraise ValueError('no such recipe')")
    assert job.code() == 2
    assert job.error_lines() == ["Error: no such recipe"]


def test_output_that_nobody_reads_is_no_error_that_is_shown(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("raise BrokenPipeError(32, 'Broken pipe', 'standard output')")
    assert job.code() == 1
    assert job.error_lines() == []


def test_only_the_error_of_a_silent_rank_is_shown_and_it_needs_no_space_on_a_disk(
    server: LaunchServer, tmp_path: Path
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    speaks = "print('progress', flush=True)\nprint('a warning', file=sys.stderr)"
    write_ranks(
        f"{speaks}\nmeet()\nif rank == 0: time.sleep(600)\nraise ValueError(os.listdir(os.environ['TMPDIR']))", tmp_path
    )
    job = server.start("ranks", tmp_path, settings=QUICK, first_rank_output=True, TMPDIR=str(temporary))
    assert job.code() == 2
    assert job.error_lines() == ["a warning", "Error (rank 1): []"]
    assert (tmp_path / "stdout").read_text() == "progress\n"
    assert names_in(temporary) == set()


def test_a_rank_that_only_exits_is_named(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("if rank == 1: os._exit(5)\ntime.sleep(600)", **QUICK)
    assert job.code() == 5
    assert job.alive() == []
    assert job.error_lines() == ["Error (rank 1): the process ended with exit status 5"]


def test_a_parent_that_ignores_sigchld_does_not_turn_a_failure_into_success(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("if rank == 1: os._exit(5)\ntime.sleep(600)", ignored=[signal.SIGCHLD], **QUICK)
    assert job.code() == 5
    assert job.error_lines() == ["Error (rank 1): the process ended with exit status 5"]


def test_a_stopped_rank_ends_the_run(start_ranks: Callable[..., Job]) -> None:
    job = start_ranks("meet()\ntime.sleep(600)", STOPPED_SECONDS=1.0, **QUICK)
    job.pid(0)
    os.kill(job.pid(1), signal.SIGSTOP)
    assert job.code(SOON) == 1
    assert job.alive() == []
    [line] = job.error_lines()
    assert line.startswith("Error (rank 1): the process was stopped (SIGSTOP) 1 seconds ago")


def test_a_short_stop_is_forgiven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = 100.0
    failure = os.open(tmp_path / "failure", os.O_RDWR | os.O_CREAT)
    with launcher.Interrupts() as interrupts, interrupts.overriding_torch_handlers():
        rank = launcher.Rank(1, ["sleep", "600"], {}, failure, silent=False)
    monkeypatch.setattr(launcher.time, "monotonic", lambda: clock)
    (pid,) = rank._context.pids().values()

    def send(number: int, wanted: int) -> None:
        os.kill(pid, number)
        seen = os.WSTOPPED | os.WCONTINUED | os.WNOWAIT
        while os.waitid(os.P_PID, pid, seen).si_code != wanted:  # type: ignore[union-attr]
            pass
        rank.update()

    for _ in range(3):  # longer in all than is forgiven at once
        send(signal.SIGSTOP, os.CLD_STOPPED)
        clock += launcher.STOPPED_SECONDS - 1
        rank.update()
        send(signal.SIGCONT, os.CLD_CONTINUED)
    assert rank.failure is None
    send(signal.SIGSTOP, os.CLD_STOPPED)
    clock += 8.0
    rank.update()
    assert rank.failure == Failure(
        clock, 1, "the process was stopped (SIGSTOP) 8 seconds ago and does not go on", lost_peer=False
    )
    monkeypatch.undo()
    rank.kill()
    os.close(failure)


def test_a_rank_that_hangs_is_found_by_its_peers(start_ranks: Callable[..., Job]) -> None:
    hang = """
    reduce = join()
    import datetime, torch
    group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=2))
    if rank == 1: time.sleep(600)
    reduce(group)
    """
    job = start_ranks(hang.replace("\n    ", "\n"), _CAUSE_SECONDS=0.5)
    assert job.code() == 1
    assert job.alive() == []
    lines = job.error_lines()
    assert lines[0] == "Error (rank 0):"
    assert lines[-1].endswith("no failure was reported by rank 1.")


@pytest.mark.parametrize("also_stopped", [False, True])
def test_nothing_outlives_a_killed_launcher(
    start_ranks: Callable[..., Job], also_stopped: bool, tmp_path: Path
) -> None:
    job = start_ranks(SLEEP_WITH_CHILDREN)
    pids = [job.pid(0), job.pid(1)]
    assert len(job.alive()) == 9  # the launcher, and four of each rank
    if also_stopped:
        os.kill(pids[1], signal.SIGSTOP)
    job.process.send_signal(signal.SIGKILL)
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)
    assert names_in(tmp_path) <= OUR_FILES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_an_interrupt_ends_everything(start_ranks: Callable[..., Job], number: signal.Signals) -> None:
    job = start_ranks(SLEEP_WITH_CHILDREN)
    job.pid(0), job.pid(1)
    job.process.send_signal(number)
    assert job.code() == 128 + number
    assert job.alive() == []
    assert job.error_lines() == [f"Ended by {number.name}."]


@pytest.mark.parametrize("twice", [False, True])
def test_ranks_that_will_not_end_are_killed(start_ranks: Callable[..., Job], twice: bool, tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: Path(PLACE, f'asked {rank}').touch())\nready()\nuntil(lambda: False)"
    )
    job = start_ranks(body, GRACE_SECONDS=600.0 if twice else 1.0)
    job.pid(0), job.pid(1)
    job.process.send_signal(signal.SIGINT)
    if twice:
        wait_until(lambda: len(list(tmp_path.glob("asked *"))) == 2, "the first interrupt is passed on")
        assert len(job.alive()) == 3
        job.process.send_signal(signal.SIGINT)
    assert job.code() == 130
    assert job.alive() == []


def test_a_rank_that_cannot_start_leaves_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def once(*, args: list[str], **options: object) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess_handler, "Popen", once)
    assert launcher.launch("absent", [], 2) == launcher.Outcome(1)
    assert started[0].returncode == -signal.SIGTERM
    said = (
        "Error: the process of rank 1 could not be started: Resource temporarily unavailable; start fewer processes, "
    )
    assert capfd.readouterr().err.startswith(said)


def test_arguments_that_the_system_does_not_take_are_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert launcher.launch("absent", ["x" * 140_000], 1) == launcher.Outcome(1)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("Error: the process of rank 0 could not be started: Argument list too long (140,0")
    assert line.endswith(" bytes); put prompts or settings into a file, and name the file")


def test_handlers_of_signals_are_restored_and_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    try:
        with launcher.Interrupts() as interrupts:
            with interrupts.overriding_torch_handlers():
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as torch sets its own
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, interrupt)


def test_arguments_reach_the_ranks_as_they_are(server: LaunchServer, tmp_path: Path) -> None:
    write_ranks("Path(PLACE, f'arguments {rank}').write_text('\\n'.join(sys.argv[1:]))", tmp_path)
    job = server.start("ranks", tmp_path, arguments=[PROMPT])
    assert job.code() == 0, job.error_lines()
    assert [(tmp_path / f"arguments {rank}").read_text() for rank in range(2)] == [PROMPT, PROMPT]


def test_modules_in_the_working_folder_are_not_imported(server: LaunchServer, tmp_path: Path) -> None:
    place, folder = tmp_path / "place", tmp_path / "clips"
    place.mkdir()
    folder.mkdir()
    write_forbidden_modules(folder, "socket", "ctypes", "torch", "json")
    body = (
        "import multiprocessing\n"
        "child = multiprocessing.get_context('spawn').Process(target=print)\n"
        "child.start()\n"
        "child.join()"
    )
    write_ranks(f"{body}\nsys.exit(child.exitcode or os.getcwd() != {str(folder)!r})", place)
    job = server.start("ranks", place, cwd=folder)
    assert job.code() == 0, job.error_lines()
    assert job.error_lines() == []


# -- under torchrun ---------------------------------------------------------------------------------------------------


@pytest.fixture
def start_torchrun(server: LaunchServer, tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    """The same ranks under torchrun."""
    jobs: list[Job] = []

    def start_two(body: str) -> Job:
        script = write_ranks(body, tmp_path)
        jobs.append(server.start_torchrun(["--standalone", "--nproc-per-node", "2", str(script)], tmp_path))
        return jobs[-1]

    yield start_two
    for job in jobs:
        job.end()


def test_under_torchrun_the_sentence_is_the_only_error_of_ours(start_torchrun: Callable[[str], Job]) -> None:
    job = start_torchrun(
        f"import torch\nmeet()\nif rank == 1: raise ValueError('step 3 is not to be had')\n{LOST_PEER}"
    )
    assert job.code() == 1
    assert job.alive() == []
    lines = job.error_lines()
    assert [line for line in lines if line.startswith("Error")] == ["Error (rank 1): step 3 is not to be had"]
    assert not any("gloo" in line for line in lines)
    assert any("ValueError: step 3 is not to be had" in line for line in lines), "torchrun's summary has it, too"


def test_nothing_outlives_a_killed_torchrun(start_torchrun: Callable[[str], Job]) -> None:
    job = start_torchrun(SLEEP_WITH_CHILDREN)
    pids = [job.pid(0), job.pid(1)]
    os.kill(pids[1], signal.SIGSTOP)
    job.process.send_signal(signal.SIGKILL)
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)


# -- what torch leaves to this module; where this fails, torch has learned it -----------------------------------------


def test_torch_does_not_notice_a_stopped_rank(tmp_path: Path) -> None:
    with launcher.Interrupts() as interrupts, interrupts.overriding_torch_handlers():
        context = start_processes(
            "rank", "sleep", args={0: ("600",)}, envs={0: {}}, logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path))
        )
    (pid,) = context.pids().values()
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert context.wait(0) is None
    context.close(signal.SIGKILL)


def test_torchs_agent_replaces_parts_of_arguments() -> None:
    assert macros.substitute([PROMPT], "1") == ["a $5 note, 1 and 1, 100 % {rank} 'quoted'"]
