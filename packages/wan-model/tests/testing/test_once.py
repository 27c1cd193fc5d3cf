"""What all test processes of a session share is made by one of them."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from wan_model.testing.once import once_in, order_by_shared_fixtures, session_folder


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


def test_first_users_go_to_the_front_and_others_to_the_end():
    uses = {"a": [], "b": ["run"], "c": ["run", "video"], "d": [], "e": ["run"], "f": ["video", "run"]}
    items = [SimpleNamespace(name=n, path=Path("/p/tests/t.py"), fixturenames=uses[n]) for n in uses]
    others = [SimpleNamespace(name=n, path=Path("/q/tests/t.py"), fixturenames=["run"]) for n in "xyz"]
    mixed = [others[0], *items[:3], others[1], *items[3:], others[2]]
    order_by_shared_fixtures(mixed, Path("/p/tests"), "run", "video", "absent")
    assert [item.name for item in mixed] == ["x", "b", "c", "a", "y", "d", "e", "f", "z"]
