"""The commands that read a dataset, on one in a store: what they print, and that credentials are nowhere in it."""

import shutil

import pytest
from object_store import ACCESS_KEY, SECRET_KEY, Fault

from wan_data.cli import main
from wan_data.inspect.verify import verify


def ends(arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


@pytest.fixture
def stored(bucket, dataset):
    folder, root = bucket
    shutil.copytree(dataset, folder / "d")
    return folder / "d", root / "d"


def test_inspect_and_sources_print_what_they_print_of_the_disk(stored, dataset, capfd, tmp_path):
    for command in (["inspect"], ["inspect", "--json"], ["sources"]):
        ends([*command, str(dataset)])
        wanted = capfd.readouterr().out
        ends([*command, str(stored[1])])
        assert capfd.readouterr().out == wanted.replace(str(dataset), str(stored[1]))


def test_a_dataset_in_a_store_is_verified(stored, dataset, capfd):
    folder, url = stored
    ends(["verify", str(url)])
    assert (
        capfd.readouterr().out
        == f"{', '.join(f'{n} {kind}' for kind, n in verify(dataset)[0].items())} checked: no problems\n"
    )
    shard = folder / "shard-rank00-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (folder / "shard-rank00-000999.tar").write_bytes(b"")
    (folder / "empty-caption.safetensors").unlink()
    _, problems = verify(url)
    assert any("shard-rank00-000001.tar has the digest" in one for one in problems)
    assert any(one.startswith("shard-rank00-000999.tar is no shard of wan-data.json") for one in problems)
    assert any(one.startswith(f"{url}/empty-caption.safetensors is missing") for one in problems)


def test_failures_are_one_sentence_without_credentials(stored, proxy, capfd, monkeypatch, caplog):
    _, url = stored
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "0")
    for status, what in ((503, "it answered 503"), (403, "was denied"), (400, "the store answered 400")):
        for command in ("inspect", "verify", "sources"):
            proxy.faults[:] = [Fault(status=status, times=10**6)]
            ends([command, str(url)], code=1)
            said = capfd.readouterr()
            (line,) = said.err.splitlines() or said.out.splitlines()[:1]
            assert what in line
            assert str(url) in line
            for secret in (SECRET_KEY, ACCESS_KEY):
                assert secret not in f"{said.out}{said.err}{caplog.text}"
    assert proxy.authorizations, "they were used"
    ends(["inspect", "s3://key:secret@bucket/d"], code=2)
    said = capfd.readouterr()
    assert "has credentials in it" in said.err
    assert "key:secret" not in said.out + said.err
