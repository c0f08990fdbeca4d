"""DeepSpeed's own reading of its JSON, and what it refuses, as one message."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from lumina.config import UserError, explain_values
from lumina.train.deepspeed.startup import import_deepspeed


def refuse_what_deepspeed_does(document: dict[str, Any], source: str) -> None:
    """UserError where DeepSpeed would refuse the filled document, with its own words, before anything is loaded. In a
    process group; each rank comes to the same."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(document))
    except ValidationError as error:
        raise UserError(f"{source}: DeepSpeed refuses {explain_values(error)}", _REMEDY) from None
    except Exception as error:  # assertions, ValueErrors, KeyErrors, TypeErrors: it has no type of its own for them
        said = str(error).strip() or "it gives no reason"
        raise UserError(f"{source}: DeepSpeed refuses it: {type(error).__name__}: {said}", _REMEDY) from None


_REMEDY = "Correct or remove the key; LUMINA_DEBUG=1 shows DeepSpeed's own log."
