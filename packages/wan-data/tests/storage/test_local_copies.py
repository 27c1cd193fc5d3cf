"""Local copies of objects: downloaded once, ahead of their use, within a bound."""

import concurrent.futures
import threading
import time

import pytest
from object_store import Fault

from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.store import list_objects


@pytest.fixture
def objects(bucket):
    folder, root = bucket
    for number in range(8):
        (folder / f"{number}.mp4").write_bytes(bytes([number]) * 1000)
    return folder, list(list_objects(root))


def wait_for(what):
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_each_object_is_downloaded_once_while_there_is_room(objects, proxy, tmp_path):
    _, found = objects
    with LocalCopies(8000, folder=tmp_path) as copies:
        for _ in range(3):
            for number, one in enumerate(found):
                with copies.open(one) as file:
                    assert file.read_bytes() == bytes([number]) * 1000
                    assert file.suffix == ".mp4"
        assert proxy.count("GET", "mp4") == 8
    assert list(tmp_path.iterdir()) == []


def test_the_bound_holds_and_the_oldest_goes_first(objects, proxy, tmp_path):
    _, found = objects
    largest = 0
    with LocalCopies(3000, folder=tmp_path) as copies:
        for one in (*found, *found[-3:]):
            with copies.open(one):
                largest = max(largest, sum(file.stat().st_size for file in tmp_path.rglob("*.mp4")))
        assert largest == 3000
        assert proxy.count("GET", "mp4") == 8, "the last three were there"


def test_objects_come_ahead_and_stay_until_they_are_used(objects, proxy, tmp_path):
    _, found = objects
    with LocalCopies(3000, folder=tmp_path) as copies:
        for one in found:
            copies.ahead(one)
        wait_for(lambda: len(list(tmp_path.rglob("[0-9]*.mp4"))) == 3)
        assert {path for _, path in proxy.requests if "mp4" in path} == {
            f"/{one.path.bucket}/{one.path.key}" for one in found[:3]
        }
        before = len(proxy.requests)
        for one in found[:3]:
            with copies.open(one):
                pass
        assert len(proxy.requests) == before


def test_a_copy_in_use_is_not_deleted(objects, tmp_path):
    _, found = objects
    with LocalCopies(1000, folder=tmp_path) as copies, concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened = threading.Event()

        def second():
            with copies.open(found[1]) as file:
                opened.set()
                return file.read_bytes()

        with copies.open(found[0]) as file:
            later = pool.submit(second)
            time.sleep(0.2)
            assert not opened.is_set()
            assert file.read_bytes() == bytes(1000)
        assert later.result(timeout=60) == bytes([1]) * 1000


def test_a_larger_object_is_alone(objects, tmp_path):
    _, found = objects
    with LocalCopies(10, folder=tmp_path) as copies:
        for one in found[:3]:
            with copies.open(one) as file:
                assert file.stat().st_size == 1000
                assert len(list(tmp_path.rglob("*.mp4"))) == 1


def test_a_failed_download_is_tried_again_by_the_next(objects, proxy):
    _, found = objects
    proxy.faults[:] = [Fault("GET", "0.mp4", status=403)]
    with LocalCopies(10_000) as copies:
        copies.ahead(found[0])
        with pytest.raises(PermissionError), copies.open(found[0]):
            pass
        with copies.open(found[0]) as file:
            assert file.read_bytes() == bytes(1000)


def test_many_threads_get_the_right_files(objects, tmp_path):
    _, found = objects

    def use(number):
        one = found[number % 8]
        copies.ahead(found[(number + 1) % 8])
        with copies.open(one) as file:
            return file.read_bytes() == bytes([number % 8]) * 1000

    with LocalCopies(2500, folder=tmp_path) as copies, concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.mp4")) <= 2500


def test_several_are_held_together_or_not_at_all(objects, tmp_path):
    _, found = objects
    with LocalCopies(3000, folder=tmp_path) as copies:
        first = copies.hold(found[:2])
        assert first is not None
        assert copies.hold(found[2:4], wait=False) is None, "there is room for one of them"
        first.release()
        second = copies.hold(found[2:6])
        assert second is not None, "more than the bound are alone"
        assert [second.file(one).read_bytes()[0] for one in found[2:6]] == [2, 3, 4, 5]
        assert len(list(tmp_path.rglob("*.mp4"))) == 4
        second.release()


def test_what_a_killed_process_has_left_is_deleted_and_what_is_in_use_stays(objects, tmp_path):
    _, found = objects
    left = tmp_path / "wan-data-copies-left"
    left.mkdir()
    (left / "0.mp4").write_bytes(b"x")
    with LocalCopies(3000, folder=tmp_path) as one, one.open(found[0]) as file:
        assert not left.exists()
        with LocalCopies(3000, folder=tmp_path) as other, other.open(found[1]):
            assert file.is_file(), "another process uses it"


def test_who_waits_is_told_of_the_end(objects, proxy, tmp_path):
    _, found = objects
    proxy.faults[:] = [Fault("GET", "0.mp4", cut=1, stall=30.0)]
    copies = LocalCopies(3000, folder=tmp_path)
    held = copies.hold(found[:1])
    assert held is not None
    threading.Timer(0.5, copies.stop).start()
    begin = time.monotonic()
    with pytest.raises(concurrent.futures.CancelledError):
        held.file(found[0])
    copies.__exit__()
    assert time.monotonic() - begin < 20
