"""The index of a dataset in a store is read by need, from copies that are gone afterwards."""

import shutil

import pytest

from wan_data.index.records import ACCEPTED, REJECTED, SourceRecord
from wan_data.index.sources import IndexState, SourceIndex, added


def test_an_index_in_a_store_is_that_of_the_disk(bucket, tmp_path, monkeypatch):
    folder, root = bucket
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    state = IndexState()
    for count in (40, 3):
        records = [SourceRecord(f"{n:02d}", ACCEPTED if n % 3 else REJECTED, sha256="0" * 64) for n in range(count)]
        state = added(tmp_path, state, records)
        state = added(tmp_path, state, [SourceRecord("x", REJECTED, f"reason {count}")])
    for part in state.parts:
        shutil.copy(tmp_path / part.name, folder)
    with SourceIndex.open(tmp_path, state.parts) as index, SourceIndex.open(root, state.parts) as stored:
        assert list(stored.records()) == list(index.records())
        assert len(list(stored.records())) == 41
        assert list(temporary.iterdir())
    assert not list(temporary.iterdir())
    (folder / state.parts[0].name).unlink()
    with pytest.raises(ValueError, match=f"{state.parts[0].name} is missing"):
        SourceIndex.open(root, state.parts)
    assert not list(temporary.iterdir())
