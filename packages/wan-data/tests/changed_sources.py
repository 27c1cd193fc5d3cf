"""Changes of the sources of the tests' dataset, and what a dataset has then."""

import shutil
import tarfile

from wan_data.index.manifest import read_manifest
from wan_data.inspect.verify import verify
from wan_data.prepare.output_folder import WORK_FOLDER
from wan_data.sources.changes import captions_of


def change_a_byte(path):
    """Change the content of a Matroska file but neither its size nor its frames."""
    content = path.read_bytes()
    assert content.count(b"Lavf") > 0
    path.write_bytes(content.replace(b"Lavf", b"Lavg"))


def change(folder):
    """Another caption for a clip of two shapes' shards, another content of equal size for one, another size for one."""
    (folder / "deep" / "tall.jsonl").write_text('{"caption": "It has another one now."}\n')
    change_a_byte(folder / "many" / "clip 1.v1.mkv")
    shutil.copy(folder / "many" / "clip 3.v1.mkv", folder / "wide.mkv")
    return ["deep/tall.mkv", "many/clip 1.v1.mkv", "wide.mkv"]


def samples(folder):
    """The content of each sample's members, by key and kind."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found, f"{member.name} is there twice"
                found[member.name] = tar.extractfile(member).read()
    return found


def is_intact(folder, sources):
    checked, problems = verify(folder, sources=sources, caption_of=captions_of(folder, sources, None))
    assert problems == []
    listed = {shard.name for shard in read_manifest(folder).shards}
    assert {path.name for path in folder.glob("*.tar")} == listed
    assert {path.name for path in folder.glob("*.tar.idx")} == {f"{name}.idx" for name in listed}
    assert not (folder / WORK_FOLDER).exists()
    return checked
