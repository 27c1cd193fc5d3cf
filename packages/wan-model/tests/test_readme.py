"""The README's Python code runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def block_with(word: str) -> str:
    (block,) = [block for block in BLOCKS if word in block]
    return block


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == len({block_with(word) for word in ("loss_sum", "LatentCodec", "Context", "QueryNorms")})


def test_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_with("loss_sum")
    exec(block, {})
    *_, comment = block.strip().splitlines()
    layout, loss, tokens = re.fullmatch(r"# (\S.*\)) loss (\S+) over (\d+) tokens", comment).groups()  # type: ignore[union-attr]
    printed = capsys.readouterr().out
    assert printed.startswith(layout)
    found = re.search(r"loss (\S+) over (\d+) tokens", printed)
    assert found is not None
    assert found[2] == tokens
    assert float(found[1]) == pytest.approx(float(loss), abs=0.02)


def test_encoding_and_decoding(tiny_folder: Path) -> None:
    names: dict[str, object] = {}
    block = block_with("LatentCodec")
    assert block.count('"FOLDER"') == 1
    exec(block.replace('"FOLDER"', repr(str(tiny_folder))), names)
    assert tuple(names["latents"].shape) == (1, 16, 3, 4, 6)  # type: ignore[attr-defined]
    assert names["text"].shape[1] == 32  # type: ignore[attr-defined]
    assert [tuple(piece.shape) for piece in names["frames"]][:2] == [(3, 1, 32, 48), (3, 4, 32, 48)]  # type: ignore[attr-defined]


def test_a_runtime_of_ones_own_sees_every_block() -> None:
    names: dict[str, object] = {}
    exec(block_with("QueryNorms"), names)
    norms = names["ops"].norms  # type: ignore[attr-defined]
    assert len(norms) == 2
    assert all(norm > 0 for norm in norms)


def test_context_parallelism_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    # Without the interpreter's finalization, during which torch's gloo threads may still release tensors and abort the
    # process; half a second later they have ended.
    end = "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    script.write_text(block_with("ContextParallel") + end, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([72, 64])") == 2
    assert not torch.distributed.is_initialized()
