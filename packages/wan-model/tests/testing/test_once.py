"""What all test processes of a session share is made by one of them."""

import threading

import pytest

from wan_model.testing.once import once_in, session_folder


def test_is_made_by_one_of_several_at_the_same_time(tmp_path):
    made, paths = [], []

    def build(path):
        made.append(path)
        path.mkdir()

    def ask():
        paths.append(once_in(tmp_path)("thing", build))  # a lock of a file's own descriptor, as another process has it

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [tmp_path / "thing"]
    assert paths == 8 * made


def test_a_failure_is_not_taken_for_the_thing(tmp_path):
    once = once_in(tmp_path)

    def fail(path):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        once("thing", fail)
    assert once("thing", lambda path: path.write_text("whole")).read_text() == "whole"


@pytest.mark.parametrize(("worker", "place"), [("gw0", "above"), (None, "base")])
def test_the_folder_is_above_those_of_the_workers(worker, place, tmp_path, monkeypatch):
    base = tmp_path / "worker"
    base.mkdir()
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)

    class Factory:
        def getbasetemp(self):
            return base

    assert session_folder(Factory(), "wan-x") == {"above": tmp_path, "base": base}[place] / "wan-x"
