import contextlib
import io
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from wan_data.shards.serialization import (
    LARGEST_INFO,
    LARGEST_LATENT,
    RefusedMember,
    info_from_json,
    info_to_json,
    latent_from_pth,
    tensor_to_pickle,
    tensor_to_pth,
    text_from_pickle,
)
from wan_model.testing.pickled_call import PickledCall

LATENT = torch.arange(48, dtype=torch.float32).reshape(2, 3, 2, 4)
TEXT = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def saved(value, **kwargs):
    out = io.BytesIO()
    torch.save(value, out, **kwargs)
    return out.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_and_the_stock_loaders_agree(dtype):
    latent, text = LATENT.to(dtype), TEXT.to(dtype)
    assert torch.equal(latent_from_pth(tensor_to_pth(latent)), latent)
    assert torch.equal(text_from_pickle(tensor_to_pickle(text)), text)
    assert torch.equal(torch.load(io.BytesIO(tensor_to_pth(latent))), latent)
    assert torch.equal(pickle.loads(tensor_to_pickle(text)), text)


def test_what_others_pickle_is_read():
    for protocol in range(2, 6):
        assert torch.equal(text_from_pickle(pickle.dumps(TEXT, protocol=protocol)), TEXT)
    assert torch.equal(latent_from_pth(saved(LATENT, _use_new_zipfile_serialization=False)), LATENT)


def test_views_do_not_take_their_storage_along():
    assert len(tensor_to_pickle(torch.zeros(100_000)[:12].reshape(3, 4))) < 5000
    assert len(tensor_to_pth(torch.zeros(100_000)[:48].reshape(2, 3, 2, 4))) < 5000


def test_bytes_are_the_same_in_another_process():
    code = (
        "import sys, torch; from wan_data.shards.serialization import *; t = torch.arange(12.).reshape(3, 4);"
        "sys.stdout.buffer.write(tensor_to_pickle(t) + tensor_to_pth(t))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == tensor_to_pickle(TEXT) + tensor_to_pth(TEXT)


def test_stock_pickles_of_equal_tensors_differ_which_is_why_ours_are_made_so():
    assert pickle.dumps(TEXT.clone()) != pickle.dumps(TEXT.clone())
    assert tensor_to_pickle(TEXT.clone()) == tensor_to_pickle(TEXT.clone())


def hostile_pickles(path):
    call, inner = PickledCall(os.mkdir, str(path)), io.BytesIO()
    torch.save([call], inner, _use_new_zipfile_serialization=False)

    nested = PickledCall(torch.storage._load_from_bytes, inner.getvalue())
    part = PickledCall(torch._utils._rebuild_tensor_v2, call, 0, (1, 1), (1, 1), False, {})
    return {"plain": pickle.dumps(call), "nested": pickle.dumps(nested), "part": pickle.dumps(part)}


@pytest.mark.parametrize("kind", ["plain", "nested", "part"])
def test_pickles_run_nothing(tmp_path, kind):
    marker = tmp_path / "marker"
    payload = hostile_pickles(marker)[kind]
    with pytest.raises(RefusedMember):
        text_from_pickle(payload)
    assert not marker.exists()
    # The control: the stock loader runs it.
    with contextlib.suppress(TypeError, AttributeError, RuntimeError):
        pickle.loads(payload)
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_members_run_nothing(tmp_path, zipped):
    marker = tmp_path / "marker"
    payload = saved(PickledCall(os.mkdir, str(marker)), _use_new_zipfile_serialization=zipped)
    with pytest.raises(RefusedMember, match="does not hold a tensor"):
        latent_from_pth(payload)
    assert not marker.exists()
    torch.load(io.BytesIO(payload), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "does not hold"),
        (bytes(range(100)), "does not hold"),
        (pickle.dumps([1, 2]), "holds a list"),
        (tensor_to_pickle(TEXT)[:-40], "does not hold"),
        (tensor_to_pickle(LATENT), "its shape is"),
        (tensor_to_pickle(TEXT.long()), "values are torch.int64"),
        (tensor_to_pickle(TEXT / 0), "not finite"),
        (tensor_to_pickle(torch.where(TEXT.max() == TEXT, torch.nan, TEXT)), "not finite"),
        (tensor_to_pickle(-1e30 * TEXT.bfloat16().abs() - 1e38), "1e\\+38|e\\+"),
        (tensor_to_pickle(TEXT + 1e6), r"a value of 1e\+06; expected a text embedding .* at most 100000"),
        (tensor_to_pickle(torch.zeros(5000, 1)), "at most"),
    ],
    ids=["empty", "noise", "list", "cut", "latent", "integers", "infinite", "one", "negative", "large", "long"],
)
def test_wrong_text_members_are_refused(payload, message):
    with pytest.raises(RefusedMember, match=message):
        text_from_pickle(payload)


def test_a_latent_of_a_thousand_is_read_and_one_beyond_is_not():
    at = LATENT / LATENT.max() * LARGEST_LATENT
    assert torch.equal(latent_from_pth(tensor_to_pth(at)), at)
    with pytest.raises(RefusedMember, match=r"a value of 1\.01e\+03; expected a latent .* of at most 1000"):
        latent_from_pth(tensor_to_pth(-at * 1.01))


def test_a_tensor_that_claims_more_than_it_stores_is_refused():
    storage = TEXT[:1].clone()._typed_storage()
    claim = PickledCall(torch._utils._rebuild_tensor_v2, storage, 0, (4000, 60000), (0, 0), False, {})
    with pytest.raises(RefusedMember, match="more values than it stores"):
        text_from_pickle(pickle.dumps(claim))


def test_json():
    assert info_from_json(info_to_json({"b": "ü", "a": 1})) == {"a": 1, "b": "ü"}
    assert info_to_json({"b": 1, "a": 2}) == info_to_json({"a": 2, "b": 1})
    for wrong in (b"[]", b"\xff", b"{"):
        with pytest.raises(RefusedMember):
            info_from_json(wrong)
    with pytest.raises(RefusedMember, match=f"more than {LARGEST_INFO} bytes"):
        info_from_json(b'{"a": "' + b"a" * LARGEST_INFO + b'"}')


def compressed(content):
    """The files of a zip archive, written again with compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return out.getvalue()


def test_an_archive_that_expands_is_refused():
    zeros = torch.zeros(16, 64, 64, 64)
    packed = compressed(tensor_to_pth(zeros))
    assert len(packed) < zeros.nbytes / 500
    assert torch.equal(torch.load(io.BytesIO(packed), weights_only=True), zeros), "torch expands it"
    with pytest.raises(RefusedMember, match=r"it is a compressed archive; expected one as torch.save writes it"):
        latent_from_pth(packed)
