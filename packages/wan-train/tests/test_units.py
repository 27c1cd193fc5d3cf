"""Small pieces that need no engine: seeds, mock packs, resume points, overrides, what writers say."""

import contextlib
import dataclasses
import os
import queue
from pathlib import Path

import pytest
import torch
import warm_ranks

from wan_model.tiny import TINY_CONFIG
from wan_train.checkpoint.folder import ResumePoint
from wan_train.checkpoint.members import read_loader_state
from wan_train.config.overrides import apply_overrides, apply_sections, read_file
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.seeds import generator_for
from wan_train.engine.write_results import WriteResults


def test_a_seed_depends_on_purpose_and_numbers_alone() -> None:
    def draw(*key: int, purpose: str = "noise") -> list[float]:
        return torch.rand(3, generator=generator_for(purpose, *key)).tolist()

    state = torch.get_rng_state()
    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(*key)) for key in [(1, 2), (2, 1), (12,), (1, 2, 0)]}) == 4
    assert draw(1, 2) != draw(1, 2, purpose="mock")
    assert torch.equal(torch.get_rng_state(), state)


SHAPES = MockConfig(shapes=[[2, 4, 6], [1, 2, 2]], context_length=5, number_packed_samples=3)


def mock(rank: int = 0, ranks: int = 1, multiple: int = 1) -> MockLoader:
    return MockLoader(SHAPES, TINY_CONFIG, rank=rank, ranks=ranks, multiple=multiple, seed=7)


def test_mock_packs_take_the_shapes_in_turn_and_are_truly_random() -> None:
    packs = iter(mock(multiple=4))
    first, second = next(packs), next(packs)
    assert first.layout.grids == ((2, 2, 3), (1, 1, 1), (2, 2, 3))
    assert first.layout.total % 4 == 0
    assert not torch.equal(first.tokens_SC, second.tokens_SC)
    texts = [*first.text_BTD, *second.text_BTD]
    assert len({text.sum(1)[0].item() for text in texts}) == len(texts)
    assert float(first.text_BTD[:, 5:].abs().max()) == 0.0


def test_two_ranks_share_the_packs_of_one() -> None:
    alone, left, right = iter(mock()), iter(mock(0, 2)), iter(mock(1, 2))
    for pack in (next(left), next(right), next(left), next(right)):
        assert torch.equal(pack.tokens_SC, next(alone).tokens_SC)


def test_mock_packs_continue_where_they_were() -> None:
    loader = mock()
    packs = iter(loader)
    next(packs)
    state = loader.state_dict()
    wanted = next(packs)
    resumed = mock()
    resumed.load_state_dict(state)
    assert torch.equal(next(iter(resumed)).tokens_SC, wanted.tokens_SC)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_loader_state_that_is_code_is_refused_and_not_run(tmp_path: Path) -> None:
    point, marker = ResumePoint(tmp_path, 1, {}), tmp_path / "marker"
    point.step_folder.mkdir()
    torch.save({"dataloader_state_dict": _Payload(marker)}, point.step_folder / "train_dataloader_dprank000.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_loader_state(point, 0)
    assert not marker.exists()
    torch.load(point.step_folder / "train_dataloader_dprank000.pt", weights_only=False)
    assert marker.exists(), "control: a plain load would have run it"


@dataclasses.dataclass(frozen=True)
class _Frozen:
    rate: float = 1.0


@dataclasses.dataclass
class _Section:
    count: int = 1
    name: str | None = None
    inner: _Frozen = dataclasses.field(default_factory=_Frozen)
    free: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})


@dataclasses.dataclass
class _Config:
    section: _Section = dataclasses.field(default_factory=_Section)


def test_overrides_reach_every_level() -> None:
    config = _Config()
    apply_overrides(config, ["section.count=3", "section.name=x", "section.inner.rate=1e-4", "section.free.a=2"])
    assert config == _Config(_Section(3, "x", _Frozen(1e-4), {"a": 2}))
    apply_overrides(config, ["section.name=null", "section.inner.rate=2"])
    assert config.section.name is None
    assert isinstance(config.section.inner.rate, float)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("section.cuont=3", "unknown configuration key section.cuont; the nearest known one is section.count"),
        ("section.inner.rat=3", "the nearest known one is section.inner.rate"),
        ("section.free.b=3", "the nearest known one is section.free.a"),
        ("section.count=true", "section.count is True; expected int"),
        ("section.count=1.5", "section.count is 1.5; expected int"),
        ("section.count.deeper=1", "section.count is a value, not a section"),
        ("section.inner=3", "section.inner is a section; set one of rate in it"),
        ("section.count", "is not an override; expected key.path=value"),
        ("section.name=[1", "is not YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, sentence: str) -> None:
    config = _Config()
    with pytest.raises(ValueError, match=r"[a-z]") as error:
        apply_overrides(config, [override])
    assert sentence in str(error.value)
    assert config == _Config()


def test_a_file_of_sections(tmp_path: Path) -> None:
    config, path = _Config(), tmp_path / "run.yaml"
    path.write_text("section:\n  count: 5\n  inner:\n    rate: 0.5\n")
    apply_sections(config, read_file(path))
    assert (config.section.count, config.section.inner.rate) == (5, 0.5)
    with pytest.raises(ValueError, match="cannot be read"):
        read_file(tmp_path / "absent.yaml")


def test_what_forked_writers_say_is_there_at_once_and_in_order() -> None:
    with contextlib.closing(WriteResults()) as results:
        with pytest.raises(queue.Empty):
            results.get_nowait()
        results.put({0: ["here"]})  # a save without forks
        large = b"x" * 3_000_000  # more than a pipe holds
        for number in range(2):
            if (pid := os.fork()) == 0:
                results.put((number, large))
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        assert results.get_nowait() == {0: ["here"]}
        assert [results.get_nowait() for _ in range(2)] == [(0, large), (1, large)]
        with pytest.raises(queue.Empty):
            results.get_nowait()
        results.put(OSError(28, "No space left on device"))
        assert results.get_nowait().errno == 28


def test_no_rank_is_forked_from_a_process_that_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it was forked"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match=r"^CUDA is initialised in this process"):
            warm_ranks._fork({}, 0, 0, None)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"which must not use CUDA: run these tests without -m gpu"):
        warm_ranks._import_engine()
