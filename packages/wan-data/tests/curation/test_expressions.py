"""Expressions select the same in Python and in SQLite, and nothing but expressions is read."""

import math
import sqlite3

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wan_data.curation.expressions import COLUMNS, compile_where

NAMES = ("motion", "seconds", "frames", "height")


def selected_by_sqlite(where, rows):
    with sqlite3.connect(":memory:") as base:
        base.execute("CREATE TABLE clips (number INTEGER, motion REAL, seconds REAL, frames INTEGER, height INTEGER)")
        values = [(number, *(row[name] for name in NAMES)) for number, row in enumerate(rows)]
        base.executemany("INSERT INTO clips VALUES (?, ?, ?, ?, ?)", values)
        found = base.execute(f"SELECT number FROM clips WHERE {where.sql} ORDER BY number", where.parameters)
        return [number for (number,) in found]


CLIP = {"motion": 0.5, "seconds": 2.0, "frames": 33, "height": 480}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("motion > 0.2 and seconds >= 2", True),
        ("motion > 0.2 and seconds > 2", False),
        ("0.2 < motion <= 0.5 < 1", True),
        ("0.2 < motion <= 0.4", False),
        ("not motion > 0.2", False),
        ("not (motion > 0.6 or seconds == 3)", True),
        ("frames / 2 == 16.5", True),
        ("frames / 16 != 2", True),
        ("-motion * 2 + 3 - +1 == 1", True),
        ("frames * motion / seconds == 8.25", True),
        ("motion > 1 or motion < 1 and seconds == 2", True),
        ("  height\n>= 480", True),
        ("1e-3 < motion", True),
        ("motion / 0 > 1 or motion / 0 <= 1", False),
        ("height == 480.0", True),
        ("height - 480 == -0.0", True),
    ],
)
def test_expressions_mean_what_they_say(text, expected):
    where = compile_where(text)
    assert where.selects(CLIP) is expected
    assert bool(selected_by_sqlite(where, [CLIP])) is expected


@pytest.mark.parametrize("text", ["motion > 0", "not motion > 0", "motion == motion", "motion != 0", "motion * 0 == 0"])
def test_what_was_not_measured_is_not_selected(text):
    clip = {**CLIP, "motion": None}
    where = compile_where(text)
    assert not where.selects(clip)
    assert not where.selects({name: value for name, value in clip.items() if value is not None})
    assert selected_by_sqlite(where, [clip]) == []
    assert compile_where(f"seconds == 2 or {text}").selects(clip), "what is true anyway is"
    assert selected_by_sqlite(compile_where(f"seconds == 2 or {text}"), [clip]) == [0]


_NUMBERS = st.one_of(
    st.integers(-9, 9), st.sampled_from([0.0, 0.5, 0.1, 1e-300, 1e308, 2.5]), st.floats(-10, 10, allow_subnormal=False)
)


def _grow(numbers):
    return st.one_of(
        st.tuples(numbers, st.sampled_from("+-*/"), numbers).map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"),
        numbers.map(lambda number: f"-{number}"),
    )


_SUMS = st.recursive(
    st.one_of(st.sampled_from(NAMES), _NUMBERS.map(lambda number: f"({number!r})")), _grow, max_leaves=6
)
_SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
_COMPARED = st.tuples(_SUMS, st.lists(st.tuples(_SIGNS, _SUMS), min_size=1, max_size=3)).map(
    lambda parts: parts[0] + "".join(f" {sign} {other}" for sign, other in parts[1])
)
_TRUTHS = st.recursive(
    _COMPARED,
    lambda truths: st.one_of(
        truths.map(lambda truth: f"not ({truth})"),
        st.tuples(truths, st.sampled_from(["and", "or"]), truths).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
    ),
    max_leaves=5,
)
_REALS = st.one_of(st.none(), st.sampled_from([0.0, -1.0, 0.5, 1e308, -1e308]), st.floats(-10, 10))
_WHOLES = st.one_of(st.none(), st.integers(-9, 9), st.sampled_from([2**53 + 1, -(2**62)]))
_ROWS = st.lists(
    st.fixed_dictionaries({"motion": _REALS, "seconds": _REALS, "frames": _WHOLES, "height": _WHOLES}),
    min_size=1,
    max_size=6,
)


@settings(max_examples=600)
@given(_TRUTHS, _ROWS)
@example("(motion * 10) - (motion * 10) < 1", [{"motion": 1e308, "seconds": None, "frames": 1, "height": None}])
@example("frames / height == 0.5", [{"motion": None, "seconds": None, "frames": 1, "height": 2}])
def test_python_and_sqlite_select_the_same(text, rows):
    where = compile_where(text)
    assert [number for number, row in enumerate(rows) if where.selects(row)] == selected_by_sqlite(where, rows)


def test_every_column_may_stand_in_an_expression():
    for name in COLUMNS:
        where = compile_where(f"{name} > 1")
        assert where.columns == {name}
        assert where.selects({name: 2})
        assert not where.selects({name: math.nan})


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 1, "cannot be read"),
        # Where Python sees an error differs between its versions.
        ("motion >", None, "cannot be read"),
        ("motion = 2", None, "cannot be read"),
        ("motoin > 2", 1, "'motoin' is no column"),
        ("seconds > 2 and  größe > 1", 18, "'größe' is no column"),
        ("größe > 1", 1, "'größe' is no column"),
        ("   seconds > x", 14, "'x' is no column"),
        ("motion", 1, "a number stands where something true"),
        ("motion and seconds > 2", 1, "a number stands"),
        ("not motion", 5, "a number stands"),
        ("2 > (motion > 1)", 6, "something true or false stands where a number"),
        ("(motion > 1) + 1 > 2", 2, "something true or false stands where a number"),
        ("motion.real > 2", 1, "something else"),
        ("__import__('os').system('true') > 2", 1, "something else"),
        ("abs(motion) > 2", 1, "something else"),
        ("motion ** 2 > 2", 1, "something else"),
        ("motion % 2 > 2", 1, "something else"),
        ("frames // 2 > 2", 1, "something else"),
        ("(lambda: 1) > 2", 2, "something else"),
        ("[motion] > 2", 1, "something else"),
        ("(motion := 2) > 1", 2, "something else"),
        ("motion > '2'", 10, "something else"),
        ("motion > True", 10, "something else"),
        ("motion > None", 10, "something else"),
        ("motion > 1j", 10, "something else"),
        ("motion > 1e999", 10, "a number is too large"),
        ("motion > 1" + "0" * 400, 10, "a number is too large"),
        ("motion is 2", 1, "a comparison other than"),
        ("motion in (1, 2)", 11, "something else"),
        ("1 if motion > 2 else 0", 1, "something else"),
        ("motion > 2; 1", 11, "cannot be read"),
        ("motion > 2\x00", None, "cannot be read"),
        ("(" * 300 + "1" + ")" * 300 + " > 1", None, "cannot be read"),
        ("not " * 60 + "motion > 1", 205, "nested more than 50 times"),
        ("motion > 1 AND seconds > 1", 12, "cannot be read"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(text, place, what):
    with pytest.raises(ValueError, match="expected an expression such as") as refused:
        compile_where(text)
    message = str(refused.value)
    assert what in message
    assert "motion, stillness, sharpness, black_borders, seconds" in message
    if place is not None:
        assert message.startswith(f"at character {place} of "), message


def test_long_expressions_are_refused():
    with pytest.raises(ValueError, match="an expression of 4000 characters is too long; expected up to 1000"):
        compile_where("motion>1" * 500)
