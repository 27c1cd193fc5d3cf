"""What happens to a preparation that is killed, starved or raced. ``nox -s soak`` runs these at full length."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("reliability_runs.py")


@pytest.fixture
def runs(clips, tiny_model, tmp_path):
    def start(what, count):
        command = [sys.executable, str(PROGRAM), what, str(clips), str(tmp_path), str(tiny_model), str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return start


def test_killed_at_any_moment_it_ends_with_the_same_bytes(runs, length):
    found = runs("kills", length(200, 12))
    print(found)
    assert found["killed"] >= length(200, 12)
    assert found["finished"] >= 1
    assert (found["half_shards"], found["different"]) == (0, 0)


def test_a_full_disk_is_named_and_a_rerun_succeeds(runs, length):
    found = runs("full_disk", length(20, 6))
    print(found)
    failed = 0
    for limit, code, said, again, same in found["runs"]:
        assert code in (0, 1), f"{limit}: {said}"
        assert (again, same) == (0, True)
        if code:
            failed += 1
            path, _, sentence = said.partition(" | ")
            assert "/run" in path, f"{limit}: {said}"
            assert "File too large" in sentence or "index cannot be written" in sentence, said
    assert failed >= len(found["runs"]) / 2


def test_two_writers_one_wins(runs, length):
    found = runs("races", length(20, 4))
    print(found)
    lost = 0
    for codes, said, same in found["runs"]:
        assert same
        assert 0 in codes
        for code, sentence in zip(codes, said, strict=True):
            if code:
                lost += 1
                assert code == 1
                assert "is being written by" in sentence
    assert lost >= 1
