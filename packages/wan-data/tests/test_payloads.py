"""Everything in a dataset that could run code: refused by name, and nothing is run; the stock loaders do run it."""

import functools
import io
import json
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.serialization import info_to_json, tensor_to_pickle, tensor_to_pth
from wan_data.shards.writer import ShardRecord
from wan_model.testing.pickled_call import PickledCall

SHARD = "shard-rank00-000000.tar"
LATENT, TEXT = torch.zeros(16, 1, 4, 4), torch.zeros(3, 8)


def legacy(value):
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def zipped(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def pickles(marker, module):
    """Pickles that make the folder ``marker``."""
    make, say = f"mkdir {marker}", f"__import__('os').mkdir({str(marker)!r})"
    return {
        "mkdir": pickle.dumps(PickledCall(os.mkdir, str(marker))),
        "system": pickle.dumps(PickledCall(os.system, make)),
        "system-protocol-0": b"cos\nsystem\n(S'" + make.encode() + b"'\ntR.",
        "popen": pickle.dumps(PickledCall(subprocess.check_call, ["mkdir", str(marker)])),
        "eval": pickle.dumps(PickledCall(eval, say)),
        "exec": pickle.dumps(PickledCall(exec, say)),
        "run-path": pickle.dumps(PickledCall(runpy.run_path, str(module))),
        "import": pickle.dumps(
            PickledCall(exec, f"import sys; sys.path.insert(0, {str(module.parent)!r}); import {module.stem}")
        ),
        "getattr": pickle.dumps(PickledCall(functools.partial(os.mkdir, str(marker)))),
        "methodcaller": pickle.dumps(PickledCall(operator.methodcaller("mkdir"), Path(marker))),
        "nested-storage": pickle.dumps(
            PickledCall(torch.storage._load_from_bytes, legacy([PickledCall(os.mkdir, str(marker))]))
        ),
        "rebuilt-tensor": pickle.dumps(
            PickledCall(
                torch._utils._rebuild_tensor_v2, PickledCall(os.mkdir, str(marker)), 0, (1, 1), (1, 1), False, {}
            )
        ),
        "behind-a-tensor": pickle.dumps((TEXT, PickledCall(os.mkdir, str(marker)))),
    }


def tars(marker, module):
    """Shards: the members that replace or join those of its sample."""
    bad = PickledCall(os.mkdir, str(marker))
    cases = {f"pickle-{name}": {"pickle": payload} for name, payload in pickles(marker, module).items()}
    return cases | {
        "pth-zipped": {"pth": zipped(bad)},
        "pth-legacy": {"pth": legacy(bad)},
        "pth-in-a-dictionary": {"pth": zipped({"latent": LATENT, "more": [bad]})},
        "pth-system": {"pth": zipped(PickledCall(os.system, f"mkdir {marker}"))},
        "another-pkl": {"pkl": pickle.dumps(bad)},
        "another-pyd": {"pyd": pickle.dumps(bad)},
        "another-nested-name": {"more.pickle": pickle.dumps(bad)},
    }


def metadata(module):
    """Files of ``.nv-meta``, or a blend, that run ``module``."""
    name = f"{module.name}:loader"
    generic = "__module__: megatron.energon\n__class__: StandardWebdatasetFactory\n"
    generic += "sample_type: {__module__: megatron.energon, __class__: TextSample}\n"
    crude = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    run = f"{{__module__: runpy, __function__: run_path, path_name: {module}}}"
    blend = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    blend += f"splits: {{train: {{path: dataset, subflavors: {{x: {run}}}}}}}\n"
    return {
        "sample-loader": {"dataset.yaml": f"{generic}sample_loader: {name}\npart_filter: {name}\n"},
        "subflavors": {"dataset.yaml": f"{crude}subflavors: {{x: {run}}}\n"},
        "blend": {"blend.yaml": blend},
    }


def write_dataset(folder, members=None):
    folder.mkdir(parents=True)
    whole = {"json": info_to_json({"caption": "x"}), "pickle": tensor_to_pickle(TEXT), "pth": tensor_to_pth(LATENT)}
    with tarfile.open(folder / SHARD, "w") as tar:
        for key in range(3):
            for kind, data in {**whole, **(members or {})}.items():
                member = tarfile.TarInfo(f"{key:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_metadata(folder, [ShardRecord(SHARD, "train", 3, 0, "")])


def marking_module(case):
    module = case / "payload.py"
    module.write_text(
        f"import os\nos.makedirs({str(case / 'marker')!r}, exist_ok=True)\ndef loader(sample):\n    return sample\n"
    )
    return module


def poison(folder):
    write_dataset(folder / "harmless" / "dataset")
    names = []
    for name in tars(Path("x"), Path("x.py")):
        case = folder / name
        case.mkdir()
        write_dataset(case / "dataset", tars(case / "marker", marking_module(case))[name])
        names.append(name)
    for name in metadata(Path("x.py")):
        case = folder / name
        shutil.copytree(folder / "harmless", case)
        for file, text in metadata(marking_module(case))[name].items():
            place = case if file == "blend.yaml" else case / "dataset" / ".nv-meta"
            if file == "dataset.yaml":
                shutil.copy(case / "payload.py", place)
            (place / file).write_text(text)
        names.append(name)
    for name in ("pipe-in-the-split", "pipe-in-the-counts"):
        case = folder / name
        shutil.copytree(folder / "harmless", case)
        url = f"pipe:mkdir {case / 'marker'}"
        (case / "url").write_text(url)
        meta = case / "dataset" / ".nv-meta"
        if name == "pipe-in-the-counts":
            (meta / ".info.json").write_text(json.dumps({"shard_counts": {url: 3}}))
        (meta / "split.yaml").write_text(json.dumps({"split_parts": {"train": [url]}, "exclude": []}))
        names.append(name)
    return names


@pytest.fixture(scope="session")
def payload_runs(once):
    def build(path):
        folders = {which: path.with_name(f"payloads-{which}") for which in ("ours", "stock")}
        for folder in folders.values():
            folder.mkdir()
        _, names = (poison(folder) for folder in folders.values())
        program = Path(__file__).with_name("payload_runs.py")
        command = [sys.executable, str(program), *map(str, folders.values())]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        found = json.loads(done.stdout)
        for which in folders:
            assert set(found[which]) == {*names, "harmless"}
        path.write_text(json.dumps(found))

    return json.loads(once("payload-runs.json", build).read_text())


def test_nothing_is_run_and_every_payload_is_named(payload_runs):
    payloads = {name: run for name, run in payload_runs["ours"].items() if name != "harmless"}
    print(len(payloads), "payloads")
    assert len(payloads) >= 25
    for name, run in payloads.items():
        assert not run["marker"], name
        assert run["events"] == [], name
        assert any(line.startswith("load: ") for line in run["said"]), (name, run["said"])
    # Without a manifest there is no latent space to name, and nothing else is refused.
    (line,) = [line for line in payload_runs["ours"]["harmless"]["said"] if not line.startswith("verify: ")]
    assert line.startswith("latent space: ")


def test_the_stock_loaders_run_them(payload_runs):
    assert not payload_runs["stock"].pop("harmless")["marker"]
    silent = [name for name, run in payload_runs["stock"].items() if not run["marker"]]
    assert silent == []
