"""A chat template chosen at import, the special tokens that it needs, and an embedding with a row for every id."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lumina.chat import bounded_call, open_tokenizer, read_json, with_special_tokens
from lumina.config import ModelConfig, UserError, did_you_mean
from lumina.files import read_text, write_text

# Stock templates (templates/NAME.jinja) and the special tokens that each writes; others are the vocabulary's own
# bos_token and eos_token.
STOCK: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "zephyr": (),
}
_ROWS = 64  # a grown embedding has a multiple of so many rows: odd widths are slow in the output layer


def find_template(given: str) -> tuple[str, str]:
    """What `--chat-template` means: its name and its text. Raises UserError."""
    if given in STOCK:
        return given, (files("lumina.infer.hf") / "templates" / f"{given}.jinja").read_text(encoding="utf-8")
    path = Path(given)
    if not path.is_file():
        raise UserError(
            f"chat template {given} is neither a file nor a stock template",
            f"Stock templates: {', '.join(STOCK)}.",
        )
    try:
        return given, read_text(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def stock_template(name: str) -> tuple[str, tuple[str, ...]]:
    """The text of a stock template, and the special tokens that it writes. Raises UserError."""
    if name not in STOCK:
        raise UserError(
            f"there is no stock chat template {name}.{did_you_mean(name, STOCK)}", f"There are: {', '.join(STOCK)}."
        )
    return find_template(name)[1], STOCK[name]


def add_tokens(folder: Path, name: str, notes: list[str]) -> None:
    """Make the tokens that the template `name` needs special ones of the tokenizer in `folder`. Raises UserError."""
    wanted, path = STOCK.get(name, ()), folder / "tokenizer.json"
    spec = read_json(path)[1]
    special = {t.get("content") for t in spec.get("added_tokens") or [] if isinstance(t, dict) and t.get("special")}
    if set(wanted) <= special:
        return
    text, fresh = bounded_call(with_special_tokens, folder, wanted)
    write_text(path, text)
    if fresh:
        notes.append(f"the vocabulary lacked {', '.join(fresh)} of the chat template {name}: added")


def check_template(folder: Path, template: tuple[str, str] | None, notes: list[str]) -> None:
    """A template that was asked for must be one to train with: raises UserError. A model without any is said."""
    if template is not None:
        try:
            open_tokenizer(folder).check_trainable()
        except UserError as error:
            raise UserError(
                f"the chat template {template[0]} does not suit this vocabulary: {error.message}",
                "Each message's content must appear in what it renders, and an answer's after what asks for it.",
            ) from None
    elif not _has_template(folder):
        notes.append(
            "it has no chat template, so it can neither be talked to nor taught conversations: import it with "
            f"--chat-template ({', '.join(STOCK)}, or a file) for that"
        )


def _has_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    settings = read_json(path)[1] if path.is_file() else {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


def fitting_config(folder: Path, config: ModelConfig, grow: bool, notes: list[str]) -> ModelConfig:
    """The model's settings with a row of the embedding for each id of the tokenizer in `folder`. Raises UserError when
    rows are missing and may not be added."""
    ids = open_tokenizer(folder).vocab_size
    if ids <= config.vocab_size:
        return config
    if not grow:
        raise UserError(
            f"the tokenizer has {ids:,} ids, the model's embedding only {config.vocab_size:,} rows",
            "Import it with --grow-vocabulary, which adds rows (each the mean of the others), or give it the tokenizer "
            "that belongs to it.",
        )
    grown = -(-ids // _ROWS) * _ROWS
    notes.append(f"the embedding has {grown:,} rows for {config.vocab_size:,}: each new one is the mean of the others")
    return config.model_copy(update={"vocab_size": grown})
