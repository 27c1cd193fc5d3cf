"""Overrides and files of sections, applied to a configuration."""

import dataclasses
from pathlib import Path

import pytest

from wan_train.config.overrides import apply_overrides, apply_sections, read_file


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
        ("count=3", "unknown configuration key count; the nearest known one is section.count"),
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
