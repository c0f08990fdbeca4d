"""Door: YAML from a user's file, a run's folder or --set. Each line: the text, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina.config import UserError, load, parse_yaml
from lumina.config.loading import MOST_YAML

LEVELS = range(1, 12)
#: Ten aliases of the line before on each line: 10^11 values in a kilobyte.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in LEVELS)
#: The same by merging: `<<` copies what it names.
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in LEVELS)

TEXTS = [
    (ALIASES, "holds more than 100,000 values"),
    (MERGES, "holds more than 100,000 values"),
    ("a: &a [*a]", "holds more than 100,000 values"),
    ("a: &a {<<: *a}", "holds more than 100,000 values"),
    ("a: " + "[" * 5000, "not valid YAML"),
    ("a: " + "{a: " * 5000, "not valid YAML"),
    ("a: 2026-13-45", "not valid YAML: month"),
    ("a: " + "9" * 5000, "not valid YAML"),
    ("a: !!python/object/apply:os.system [id]", "not valid YAML"),
    ("a: !!int x", "not valid YAML"),
    ("? [a]\n: 1\n? {b: c}\n: 2\n", None),  # keys become text
    ("a: \x1b[2J", "not valid YAML"),
    ("- 1", "is not a mapping"),
    ("a: 1\na: 2", "`a` was already given on line 1"),
    ("a: 1\n--- \nb: 2", "not valid YAML"),
    ("#" * (MOST_YAML + 1), "has more than 1,048,576 characters"),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("text", "said"), TEXTS, ids=lambda value: repr(value)[:30])
def test_a_text_is_refused_in_a_message(text: str, said: str | None) -> None:
    if said is None:
        parse_yaml(text, "the file")
        return
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "the file")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("#" * (MOST_YAML + 1))
    with pytest.raises(UserError, match="it has more than"):
        load(str(tmp_path / "a.yaml"))


SETS = [
    "seed=[" + ",".join(["1"] * 200_001) + "]",
    "seed=" + "[" * 5000,
    "seed=2026-13-45",
    "seed=" + "9" * 5000,
    "seed=!!python/name:os.system",
    'experiment_name="../../x"',
    'experiment_name="a/../../x"',
    "experiment_name=/tmp/x",
    "experiment_name=" + "x" * 300,
    'experiment_name="a\\0b"',
    'experiment_name="a\\e[2Jb"',
    'output_dir="a\\0b"',
    'cache_dir="a\\0b"',
]


@pytest.mark.parametrize("pair", SETS, ids=lambda value: repr(value)[:30])
def test_a_setting_is_refused_in_a_message(pair: str) -> None:
    with pytest.raises(UserError):
        load("nano", {}, [pair])


def test_names_that_are_odd_but_names() -> None:
    for name in ("v[/x]", "Läufe/März", "a b", "…"):
        assert load("nano", {"experiment_name": name}).experiment_name == name
