"""Grammars of JSON schemas are compiled once as long as they are in use, and their constraints are independent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina.chat import open_tokenizer
from lumina.config import UserError
from lumina.infer.generation import constraint as room
from lumina.infer.generation.constraint import GRAMMARS, CallTokens, GrammarCompiler
from tests.small_tokenizer import VOCABULARY, write_tokenizer

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed: the extra `serve`")


def test_grammars_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = llguidance.LLMatcher

    class Counted:
        grammar_from_json_schema = real.grammar_from_json_schema
        grammar_from_lark = real.grammar_from_lark

        def __new__(cls, vocabulary: Any, grammar: str, **options: Any) -> Any:
            compiled.append(grammar)
            return real(vocabulary, grammar, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", Counted)
    assert room.import_module("llguidance").LLMatcher is Counted
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    grammars = GrammarCompiler(tokenizer, VOCABULARY)
    schemas = [{"type": "array", "items": {"type": "integer"}, "maxItems": n} for n in range(GRAMMARS + 1)]
    first = grammars.json(schemas[0])()
    begun = first.forbidden().clone()
    first.push(tokenizer.encode("[")[0])
    assert not first.forbidden().equal(begun)
    assert grammars.json(dict(schemas[0]))().forbidden().equal(begun), "another answer begins at the beginning"
    assert len(compiled) == 1
    for schema in schemas:
        grammars.json(schema)
    assert len(compiled) == GRAMMARS + 1
    grammars.json(schemas[1])  # still held: the oldest went
    assert len(compiled) == GRAMMARS + 1
    grammars.json(schemas[0])
    assert len(compiled) == GRAMMARS + 2
    # The order of a schema's properties is that of the answer: another order is another grammar.
    ordered = [{"type": "object", "properties": {key: {"type": "null"} for key in names}} for names in ("ab", "ba")]
    for schema in ordered:
        grammars.json(schema)
    assert len(compiled) == GRAMMARS + 4
    calls = CallTokens(0, 1, "", "")
    for _ in range(2):
        grammars.calls(calls, {"f": {"type": "object"}})
    assert len(compiled) == GRAMMARS + 5
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be kept"):
            grammars.json({"not": {"type": "string"}})
