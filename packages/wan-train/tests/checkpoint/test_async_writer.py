"""Supervision of the process that writes checkpoints on CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest

# As Megatron-Core hands a checkpoint over and waits for it.
SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from wan_train.checkpoint.async_writer import WriterExitedError, supervise_writer

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
