"""Frozen dataclasses come back from disk as they were, or are refused by name."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from batchlr.dataclass_files import load_dataclass, save_dataclass
from batchlr.measured import Measured


@dataclass(frozen=True)
class Inner:
    weight: Measured
    table: np.ndarray
    name: str


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float
    curvature: Measured
    label: str | None
    flags: tuple[bool, ...]
    pair: tuple[int, Measured] | None
    inner: Inner
    other: Inner | None
    matrices: np.ndarray
    empty: tuple[float, ...] = ()


def make(**changes):
    inner = Inner(Measured(1 / 3, 0.1), np.arange(6.0).reshape(2, 3) / 7, "in")
    values = {
        "count": 3,
        "rate": 0.1 + 0.2,
        "curvature": Measured(2.5, 1e-300),
        "label": None,
        "flags": (True, False),
        "pair": (4, Measured(1e300, 0.25)),
        "inner": inner,
        "other": Inner(Measured(-1.0, math.nan), np.array([math.nan, math.inf]), ""),
        "matrices": np.zeros((2, 0)),
    }
    return Outer(**{**values, **changes})


def there_and_back(value, path):
    save_dataclass(value, path, version=3)
    return load_dataclass(Outer, path, version=3)


def same_number(one, two):
    assert type(one) is type(two)
    assert one == two or (math.isnan(one) and math.isnan(two))
    if isinstance(one, Measured):
        same_number(one.stderr, two.stderr)


def same_inner(one, two):
    same_number(one.weight, two.weight)
    assert one.name == two.name
    assert one.table.dtype == two.table.dtype
    assert np.array_equal(one.table, two.table, equal_nan=True)


def test_every_kind_of_field_comes_back_bit_for_bit(tmp_path):
    want = make()
    got = there_and_back(want, tmp_path / "deep" / "er" / "file.json")
    for name in ("count", "rate", "curvature"):
        same_number(getattr(want, name), getattr(got, name))
    assert got.label is None
    assert (got.flags, got.empty) == ((True, False), ())
    assert [type(part) for part in got.flags] == [bool, bool]
    assert got.pair[0] == 4
    assert type(got.pair[0]) is int
    same_number(want.pair[1], got.pair[1])
    same_inner(want.inner, got.inner)
    same_inner(want.other, got.other)
    assert got.matrices.shape == (2, 0)


def test_what_may_be_missing_comes_back_missing(tmp_path):
    got = there_and_back(make(pair=None, other=None, label="a.b"), tmp_path / "file")
    assert (got.pair, got.other, got.label) == (None, None, "a.b")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
def test_special_numbers_come_back(value, tmp_path):
    got = there_and_back(make(rate=value, curvature=Measured(value, value)), tmp_path / "file")
    same_number(value, got.rate)
    same_number(Measured(value, value), got.curvature)
    assert math.copysign(1, got.rate) == math.copysign(1, value)


def test_arrays_lie_beside_readable_numbers(tmp_path):
    save_dataclass(make(), tmp_path / "file", version=3)
    assert {path.name for path in tmp_path.iterdir()} == {"file.json", "file.npz"}
    content = json.loads((tmp_path / "file.json").read_text())
    assert (content["format"], content["count"], content["curvature"]) == (3, 3, 2.5)
    assert content["standard_errors"]["inner"] == {"weight": 0.1}
    assert content["standard_errors"]["pair"] == {"1": 0.25}
    with np.load(tmp_path / "file.npz", allow_pickle=False) as arrays:
        assert {"inner.table", "other.table", "matrices"} <= set(arrays)


def test_numpy_numbers_become_plain_ones(tmp_path):
    got = there_and_back(make(rate=np.float64(0.5), empty=(np.float64(1.0),)), tmp_path / "file")
    assert (got.rate, got.empty) == (0.5, (1.0,))
    assert type(got.rate) is float


def test_saving_again_replaces_the_old_one(tmp_path):
    save_dataclass(make(), tmp_path / "file", version=3)
    assert there_and_back(make(count=4, other=None), tmp_path / "file").count == 4


@pytest.mark.parametrize("name", ["step.100", "step.100.json"])
def test_dots_in_a_name_are_part_of_it(name, tmp_path):
    there_and_back(make(), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"step.100.json", "step.100.npz"}


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_missing_file_is_named(suffix, tmp_path):
    save_dataclass(make(), tmp_path / "file", version=3)
    (tmp_path / f"file{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"file\{suffix}"):
        load_dataclass(Outer, tmp_path / "file", version=3)


def change(path, alter):
    content = json.loads(path.read_text())
    alter(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "no format": (lambda p: change(p, lambda c: c.pop("format")), "format"),
    "a field missing": (lambda p: change(p, lambda c: c.pop("rate")), "rate"),
    "an inner field missing": (lambda p: change(p, lambda c: c["inner"].pop("name")), "name"),
    "a surplus field": (
        lambda p: change(p, lambda c: c.update(color="red", age=3)),
        r"unknown entries \['age', 'color'\]",
    ),
    "a surplus inner field": (
        lambda p: change(p, lambda c: c["inner"].update(color="red")),
        r"unknown entries \['color'\]",
    ),
    "no standard errors": (lambda p: change(p, lambda c: c.pop("standard_errors")), "standard"),
    "a word for a number": (lambda p: change(p, lambda c: c.update(curvature="x")), "convert"),
    "a list": (lambda p: p.write_text("[1, 2]"), "integer"),
    "no JSON": (lambda p: p.write_text("{"), "Expecting property name"),
    "not text": (lambda p: p.write_bytes(bytes(range(256))), "codec"),
    "no arrays": (lambda p: p.with_suffix(".npz").write_bytes(b""), ""),
    "garbled arrays": (lambda p: p.with_suffix(".npz").write_bytes(b"not an archive"), ""),
    "truncated arrays": (
        lambda p: p.with_suffix(".npz").write_bytes(p.with_suffix(".npz").read_bytes()[:90]),
        "",
    ),
    "an array missing": (
        lambda p: np.savez(p.with_suffix(".npz"), matrices=np.zeros(2)),
        "table",
    ),
}


@pytest.mark.parametrize(("how", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused_by_name_and_reason(how, words, tmp_path):
    path = tmp_path / "file.json"
    save_dataclass(make(), path, version=3)
    how(path)
    with pytest.raises(ValueError, match=rf"file\.json is not a Outer of format 3: .*{words}"):
        load_dataclass(Outer, path, version=3)


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_is_refused(version, tmp_path):
    save_dataclass(make(), tmp_path / "file", version=version)
    with pytest.raises(ValueError, match="not a Outer of format 3: 'another format version'"):
        load_dataclass(Outer, tmp_path / "file", version=3)
