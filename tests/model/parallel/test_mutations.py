"""The list of mutants fits the sources; `python -m tests.model.parallel.mutations` runs the tests against them."""

from __future__ import annotations

import pytest

from tests.model.parallel.mutations import MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_text_is_there_once(mutation: Mutation) -> None:
    source = (ROOT / "lumina" / mutation.file).read_text()
    assert mutated(mutation, source) != source
    assert (ROOT / mutation.tests.partition("::")[0]).exists()
