"""The benchmark session runs and writes figures that hang together; how large they are is nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"
# Before what is installed come the sources under test, where pytest was given others.
PYTHONPATH = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))

# The tables of a GPU, on the CPU at a tiny size: what they say is not speed, but every row of them is filled.
GPU_TABLES = """
import json, torch
from bench import infer, infer_cuda, model_cuda
from wan_model import WanConfig

config = WanConfig(num_heads=2, head_dim=24, ffn_dim=64, num_layers=1, text_dim=32, text_length=512, freq_dim=32)
tables = [
    *model_cuda.tables(torch.device("cpu"), quick=True, config=config, video=(2, 4, 4)),
    *infer_cuda.tables(quick=True, shape=infer.QUICK),
]
print(json.dumps([vars(table) for table in tables]))
"""


def _python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_tables(tmp_path):
    printed = _python("-m", "bench", "--quick", "--of", "model", "--device", "cpu", "--folder", str(tmp_path))
    report = json.loads((tmp_path / "model.json").read_text())
    assert report["conditions"]["threads"] == "1"
    titles = [table["title"] for table in report["tables"]]
    assert len(titles) == 7
    markdown = (tmp_path / "model.md").read_text()
    for table in report["tables"]:
        assert table["title"] in printed
        assert table["title"] in markdown
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) and all(row) for row in table["rows"])
    limit, small, _, recompute, traffic, _, lora = report["tables"]
    assert float(lora["rows"][0][4]) == 3, "gradients and two moments of the adapters, and nothing of the base"
    for table, columns in ((limit, range(4, 7)), (small, [4]), (recompute, [3]), (traffic, [4]), (lora, [3])):
        assert all(0.01 < float(row[i].split()[0]) < 100 for row in table["rows"] for i in columns)


def test_data_tables(tmp_path):
    _python("-m", "bench", "--quick", "--of", "data", "--folder", str(tmp_path))
    whole, processes, loading, stored, near, scale = json.loads((tmp_path / "data.json").read_text())["tables"]
    assert float(whole["rows"][0][3]) > 1, "the program does more than its encoders"
    assert float(processes["rows"][0][2]) > 0.1
    assert [row[0] for row in loading["rows"]] == ["tarfile, bytes only", "loader, no worker", "loader, one worker"]
    assert all(float(row[1]) > 1 for row in loading["rows"])
    assert [row[0] for row in stored["rows"]][:2] == ["disk", "store"]
    assert all(float(row[1]) > 1 for row in stored["rows"])
    assert near["rows"][0][:4] == ["3,000", "30", "30", "0"]
    assert [row[:2] for row in scale["rows"]] == [["300", "3"]]
    assert all(cell.endswith(" MB") for cell in scale["rows"][0][2:])


def test_infer_tables(tmp_path):
    _python("-m", "bench", "--quick", "--of", "infer", "--folder", str(tmp_path))
    step, whole, several, decoding, precision, lora, needs = json.loads((tmp_path / "infer.json").read_text())["tables"]
    assert float(step["rows"][0][3]) < 1e-4, "both sides sample the same"
    assert all(0.01 < float(table["rows"][0][2]) < 100 for table in (step, whole))
    assert len(several["rows"]) == len(decoding["rows"]) == 2, "the quick ones"
    assert several["rows"][0][2] == "1.00"
    assert len({row[3] for row in decoding["rows"]}) == 1, "every way decodes the same pixels"
    assert 0 < float(precision["rows"][0][0]) < 0.05
    # Both ways sample the same.
    assert float(lora["rows"][0][7]) < 1e-4
    assert all(0.01 < float(lora["rows"][0][column]) < 100 for column in (3, 5))
    assert float(lora["rows"][0][6].removesuffix(" %")) > 1
    # A hundred forward passes of 283.0 and 1,678.4 TFLOP.
    assert [row[5] for row in needs["rows"][:2]] == ["28.3", "167.8"]


def test_gpu_tables_name_what_cannot_run():
    forward, training, step, whole = json.loads(_python("-c", GPU_TABLES))
    theirs, auto, *others = step["rows"]
    assert [row[0] for row in step["rows"]] == [
        "diffusers' WanPipeline", "wan-infer, auto", "wan-infer, cudnn", "wan-infer, flash"
    ]  # fmt: skip
    assert theirs[5] == "1.00"
    assert 0.01 < float(auto[5]) < 100
    assert 0 < float(auto[6]) < 0.05, "they sample the same but for rounding"
    assert all(" needs CUDA" in row[1] for row in others)
    assert 0.01 < float(whole["rows"][0][2]) < 100
    assert [row[0] for row in forward["rows"]] == ["diffusers", "auto", "cudnn", "flash", "varlen"]
    assert [row[:2] for row in training["rows"][:2]] == [["diffusers", "none"], ["diffusers", "block"]]
    assert len(training["rows"]) == 2 + 4 * 4
    for row in forward["rows"] + training["rows"]:
        assert len(row) == len(forward["columns"])
        if row[0] in ("diffusers", "auto"):
            assert row[2].endswith(" ms")
            assert float(row[6]) > 0
        else:
            assert row[2].startswith(f"attention {row[0]} needs CUDA")


def test_no_gpu_is_one_sentence(tmp_path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--folder", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("--device is cuda and there is no CUDA device here; leave it out")
    assert not (tmp_path / "none").exists()


def test_the_plan_of_ten_million_clips_is_the_computed_one():
    page = (TOOLS.parent / "packages/wan-data/PLANNING.md").read_text(encoding="utf-8")
    computed = _python("-m", "bench.data_cost").strip()
    assert computed.count("### ") == 3
    assert computed.replace("### ", "## ") in page
    rates = json.loads(
        _python("-c", "import json; from bench.data_cost import Rates; print(json.dumps(vars(Rates())))")
    )
    for name, unit in (("probing", "ms of a core"), ("decoding", "ms of a core"), ("encoding", "s"), ("planning", "s")):
        assert f"{rates[name]:g} {unit}" in page
