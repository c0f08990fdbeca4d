"""Names of another package are checked by owner, existence and parameters; the standard library stands for it."""

import pytest

from lumina.config import UserError
from lumina.config.private_names import PrivateName, require

THERE = [
    PrivateName("json.decoder", "scanner", "a module's global"),
    PrivateName("json:JSONDecoder", "decode", "a method", ("s",)),
    PrivateName("json:JSONDecoder", "decode", "a method whose further parameter has a default", ("s", "_w")),
    PrivateName("json:JSONDecoder", "object_hook", "an attribute of instances"),
    PrivateName("ast:NodeVisitor", "visit", "a method", ("node",)),
    PrivateName("functools:update_wrapper", "__wrapped__", "what a function gives to its argument"),
    PrivateName("collections:Counter", "fromkeys", "a classmethod", ("iterable", "v")),
]
GONE = [
    PrivateName("json.decoderr", "scanner", "x"),
    PrivateName("json:JSONDecoderr", "decode", "x"),
    PrivateName("json:JSONDecoder", "decod", "x"),
    PrivateName("json:JSONDecoder", "decode", "x", ("text",)),
    PrivateName("json:JSONDecoder", "decode", "x", ("s", "_w", "idx")),
    PrivateName("json:JSONDecoder", "raw_decode", "x", ()),
    PrivateName("json:dumps", "object_hook", "x"),
]


@pytest.mark.parametrize("name", THERE, ids=lambda one: one.why)
def test_what_is_there_passes(name: PrivateName) -> None:
    require("numpy", [name])


@pytest.mark.parametrize("name", GONE, ids=lambda one: f"{one.owner}.{one.name}{one.parameters or ''}")
def test_what_is_gone_or_changed_is_refused_by_name(name: PrivateName) -> None:
    with pytest.raises(UserError, match=name.name) as caught:
        require("numpy", [THERE[0], name])
    assert name.owner in str(caught.value)
    assert "pip install 'numpy" in str(caught.value)


def test_all_that_is_gone_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        require("numpy", GONE)
    assert str(caught.value).count("(x)") + str(caught.value).count(": x)") == len(GONE)
