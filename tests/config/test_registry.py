"""Extension points: our own by folder, others' by entry point, and what is said where neither fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lumina.config import UserError, registry
from lumina.config.registry import Registry

# Any folder of files with one attribute in common serves: here the package's own configuration.
OWN = Registry("setting", "lumina.test_settings", "config", "UserError")


def test_own_things_are_a_folders_files() -> None:
    assert "errors" in OWN.names()
    assert OWN.get("errors") is UserError
    assert (
        OWN.summary("errors") == "The one exception for a user's mistake, and the hint that goes with a misspelt name."
    )


def test_a_name_may_be_written_with_another_separator(tmp_path: Path) -> None:
    for name in ("one_cycle", "_helper", "cosine"):
        (tmp_path / f"{name}.py").touch()
    rules = Registry("rule", "lumina.test_rules", str(tmp_path), "x", separator="-")
    assert list(rules.own()) == ["cosine", "one-cycle"]


def test_a_misspelt_name_is_told_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"no such setting: erors. Did you mean errors\? There are: "):
        OWN.check("erors")


def test_another_packages_thing_is_found_by_entry_point(install) -> None:
    install("lumina.test_settings", "steps", '"""Steps."""\nTHING = 7\n')
    assert "steps" in OWN.names()
    assert OWN.check("steps") == "steps"
    assert OWN.get("steps") == 7
    assert OWN.summary("steps") == "of staircase"


def test_one_that_does_not_load_names_its_package(install) -> None:
    install("lumina.test_settings", "steps", "import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"the setting steps \(staircase:THING, of staircase\) does not load"):
        OWN.get("steps")


def test_a_name_taken_twice_is_refused(install) -> None:
    install("lumina.test_settings", "errors", "THING = 1\n")
    with pytest.raises(UserError, match="two packages have a setting called errors: lumina and staircase"):
        OWN.names()


def test_the_document_lists_every_group() -> None:
    documented = re.findall(r"^\| `(lumina\.\w+)` \|", (Path(__file__).parents[2] / "docs/api.md").read_text(), re.M)
    groups = [each.group for each in vars(registry).values() if isinstance(each, Registry)]
    assert sorted(documented) == sorted(groups)
