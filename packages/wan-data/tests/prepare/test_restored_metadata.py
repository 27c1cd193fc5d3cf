import shutil

from wan_data.inspect.verify import verify
from wan_data.prepare.settings import PrepareSettings


def test_preparing_again_writes_damaged_metadata_anew(dataset, clips, tiny_model, prepared, small, silent, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    min(copy.glob("*.idx")).unlink()
    (copy / ".nv-meta" / ".info.json").write_text("{}")
    (copy / ".nv-meta" / "index.sqlite").write_bytes(b"")
    assert verify(copy)[1]
    prepared(clips, copy, tiny_model, PrepareSettings(**small), report=silent)
    assert any("has been written anew" in line for line in silent.lines)
    assert verify(copy)[1] == []
