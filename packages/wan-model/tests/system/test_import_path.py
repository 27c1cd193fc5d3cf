import os
import subprocess
import sys

import pytest

from wan_model.system.standard_streams import checked_streams

CHILDREN = """
import multiprocessing.forkserver, multiprocessing.resource_tracker, sys
from wan_model.system.standard_streams import checked_streams

def nothing():
    pass

if __name__ == "__main__":
    with checked_streams(run=len(sys.argv) > 1):
        multiprocessing.resource_tracker.ensure_running()
        multiprocessing.forkserver.ensure_running()
        process = multiprocessing.get_context("spawn").Process(target=nothing)
        process.start()
        process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("kind", [[], ["run"]])
def test_helpers_of_multiprocessing_import_nothing_from_the_working_folder(tmp_path, monkeypatch, kind):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "command").write_text(CHILDREN)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for name in ("signal", "socket", "base64", "ctypes", "multiprocessing"):
        (downloads / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = [sys.executable, str(tmp_path / "bin" / "command"), *kind]
    done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
    assert not (tmp_path / "imported").exists()
    assert done.returncode == 0, done.stderr


def test_the_environment_is_as_before_after_the_command(monkeypatch):
    for before in ("", "1", None):
        if before is None:
            monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        with checked_streams():
            assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ.get("PYTHONSAFEPATH") == before
