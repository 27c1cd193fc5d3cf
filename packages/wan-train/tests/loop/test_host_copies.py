"""A step and a validation copy nothing from the host but their packs; see ``host_copies.py``."""

import json
from pathlib import Path

import torch
from host_copies import Copies
from training_runs import RUN_OPTIONS, run
from warm_ranks import Call


def test_what_copies_from_the_host_is_seen() -> None:
    held = torch.ones(3)
    with Copies() as copies:
        torch.full((), 3, dtype=torch.int, device=held.device)
        torch.full_like(held, 3)
        held.to("cpu")
    assert copies.operators
    assert copies.seen == []
    with Copies() as copies:
        torch.tensor(3)
        held.new_tensor(3)
        held.to("meta")
        torch.empty(3, device="meta").copy_(held)
    assert copies.seen == ["aten::lift_fresh", "aten::lift_fresh", "aten::_to_copy", "aten::copy_"]


def test_no_step_and_no_validation_copies_from_the_host(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    settings = ("train.train_iters=2", "validation.interval=1", "validation.samples=3")
    ended = run(
        (*RUN_OPTIONS, *settings),
        tmp_path / "run",
        calls=[Call("host_copies:note_host_copies", (str(found),))],
    )
    assert ended.codes == [0], ended.errors
    counts = json.loads(found.read_text())
    assert list(counts) == ["step", "loss", "validation", "validation loss"]
    assert all(operators for operators, _ in counts.values())
    # Random numbers of a validation are the CPU's, and reach the device from pinned memory.
    assert {name: seen for name, (_, seen) in counts.items()} == {name: [] for name in counts}
