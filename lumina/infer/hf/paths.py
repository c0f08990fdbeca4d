"""What can be seen to be wrong with the arguments of an import or an export before torch is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from lumina.config import UserError
from lumina.files import real_path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def check_new_folder(out: Path) -> None:
    """Raise UserError where `out` is a file, lies under one, or holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something", "Choose another folder, or remove it first.")
    there = next(path for path in (out, *real_path(out).parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file: {out} cannot be a folder", "Choose another folder.")


def check_source(source: Path) -> None:
    """Raise UserError, with the remedy, where `source` is not the folder of a whole Hugging Face model."""
    if not source.exists():
        if _HUB_NAME.fullmatch(str(source)):
            raise UserError(
                f"cannot read {source}: there is no such folder, and names on a hub are not looked up",
                f"Download it first (hf download {source} --local-dir DIR) and give DIR.",
            )
        raise UserError(f"cannot read {source}: there is no such folder", "Give a Hugging Face model's folder.")
    if not source.is_dir():
        raise UserError(f"cannot read {source}: it is a file", "Give the folder that holds config.json.")
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        raise UserError(
            f"{source} holds an adapter (adapter_config.json), not a whole model",
            "Merge it into its base with peft first: PeftModel.from_pretrained(BASE_MODEL, ADAPTER)"
            ".merge_and_unload().save_pretrained(OUT); copy the tokenizer's files.",
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UserError(f"shard size {text} is not a size", "Give it as 5GB, 500MB or a number of bytes.")
    return size
