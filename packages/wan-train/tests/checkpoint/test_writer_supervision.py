"""Supervision of the processes that write checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest

# As Megatron-Core hands a checkpoint over and waits for it.
SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from wan_train.checkpoint.writer_supervision import WriterExitedError, supervise_writer

def work(how, queue):
    if how == "fails":
        sys.exit(3)
    if how == "fails slowly":
        os.closerange(3, 256)  # its pipe closes some time before it has an exit status
        time.sleep(1)
        os._exit(3)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    queue.get()
    queue.task_done()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue, started = context.JoinableQueue(), []
    supervise_writer(lambda: started[0] if started else None)
    queue.put("a checkpoint")
    process = context.Process(target=work, args=(sys.argv[1], queue))
    process.start()
    started.append(process)
    try:
        queue.join()  # where Megatron-Core waits for its word
    except WriterExitedError as error:
        print(error)
    process.join()
    time.sleep(0.3)
    print("went on")
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("writes", ""),
        ("fails", "the process that writes checkpoints ended with exit status 3"),
        ("fails slowly", "the process that writes checkpoints ended with exit status 3"),
        (
            "is killed",
            "the process that writes checkpoints ended with SIGKILL; the system does that when memory runs out",
        ),
    ],
)
def test_who_waits_for_a_dead_writer_is_told(how: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path), how], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "went on"
    if said:
        assert lines[0].startswith(said)
        assert "the same command resumes from them" in lines[0]
    else:
        assert len(lines) == 1


# As Megatron-Core 0.16 has the files of a checkpoint written side by side.
FORKS = """
import multiprocessing, os, signal
from wan_train.checkpoint.writer_supervision import WriterExitedError, forked_writers_supervised

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def writes(results):
    results.put(bytes(200_000))  # more than a pipe holds

context = multiprocessing.get_context("fork")
queue, results = context.JoinableQueue(), context.SimpleQueue()
queue.put("a file")
first, second = context.Process(target=killed), context.Process(target=writes, args=(results,))
try:
    with forked_writers_supervised():
        first.start()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        second.start()  # multiprocessing forgets the first here
        queue.join()
except WriterExitedError as error:
    print(error)
print(second.is_alive(), signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL)
print(context.Process.start is multiprocessing.Process.start)
"""


def test_a_fork_that_dies_before_the_next_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(FORKS)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a process that writes its files ended with SIGKILL; the system does that when memory runs out",
        "False True",
        "True",
    ]
