"""Configuration loading: a preset or a YAML file, flags and --set pairs -> one validated `Config`.

Precedence, lowest first: preset < YAML file < flags < --set. A YAML file may name the preset that it starts from with
a `preset:` key; without one it starts from `medium`, the command line's default.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lumina.config.errors import UserError, did_you_mean, explain_values
from lumina.config.renamed import new_name, upgrade
from lumina.config.schema import FIRST_TEMPLATE, MIN_VOCAB, Config, ModelConfig
from lumina.config.schema.short_rope import is_short_for, rope_scaling_of, trained_length
from lumina.files import read_json, read_text

DEFAULT_PRESET = "medium"
MOST_VALUES = 100_000
MOST_YAML = 1 << 20  # bytes; the largest configuration has a hundredth of it
PRESETS = ("nano", "debug", "small", "medium", "1b", "large", "3b", "8b")

# Names people type for a key that is called something else: the command line's flags and other trainers' names.
SYNONYMS = {
    "lr": "learning_rate", "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps", "micro_batch_size": "batch_size",
    "n_layers": "num_layers", "n_heads": "num_heads",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_size",
    "model_type": "family", "max_seq_len": "seq_length",
    "dtype": "precision", "scheduler": "lr_scheduler",
    "patience": "early_stopping_patience", "r": "lora_rank",
    "target_modules": "lora_targets",
}  # fmt: skip

# What a preset's name stands for: a model of other sizes does not go by it.
_SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")

log = logging.getLogger("lumina.config")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with two differences: `1e-4` is the float that YAML 1.2 takes it for (in YAML 1.1, without
    a point, it is a string), and a key given twice within one mapping is an error.

    PyYAML's nodes know their lines, so that all that is ours is to keep them. ruamel.yaml (0.19) hands lines out with
    its values, but reads YAML 1.2 throughout: `yes` would become text and `010` ten in files that have been read
    otherwise so far; it is nine times slower on a run's config.yaml (142 ms against 16), and PyYAML would stay, for
    what is written and for the libraries that need it.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`, whose keys may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # PyYAML refuses the others
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+|\d+\.\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def preset_names() -> tuple[str, ...]:
    """The presets that come with Lumina, smallest first."""
    return PRESETS


def load(
    preset_or_yaml: str = DEFAULT_PRESET, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Config:
    """One validated configuration.

    Args:
        preset_or_yaml: a preset's name, or the path of a YAML file of flat keys.
        flags: values by key from the command line; None means that the flag was not given.
        sets: `key=value` strings; the value is read as YAML (`true`, `3`, `1e-4`, `[a, b]`).

    Raises:
        UserError: no such preset or file, an unknown key (with a did-you-mean and the line), a value out of bounds.
    """
    resuming = (flags or {}).get("resume") is not None or any(pair.startswith("resume=") for pair in sets)
    values, file_values, lines, where = _base(preset_or_yaml, resuming)
    origin = {name: f"{where}, line {lines[name]}" if name in lines else where for name in file_values}
    explicit, preset = dict(file_values), dict(values)
    for name, value in (flags or {}).items():
        if value is not None:
            _check_key(name, "the command line")
            explicit[name] = value
            origin[name] = "the command line"
    for pair in sets:
        for name, value in _parse_set(pair).items():
            explicit[name] = value
            origin[name] = f"--set {pair}"
    own, began = _goes_on_from(explicit)
    if began is not None:  # a run that began from scratch is resumed by naming its preset again
        values |= own or inherited(began, values["seq_length"])
    merged = values | explicit
    if isinstance(text := merged.get("rope_scaling"), str):
        merged["rope_scaling"] = explicit["rope_scaling"] = _long_form(text, merged, file_values, own, began)
    _lower_the_floor(merged, explicit)
    if "model_name" not in explicit and any(merged.get(name) != preset.get(name) for name in _SIZES):
        merged.pop("model_name", None)  # another size than the preset's: not the model that goes by its name
    try:
        config = Config.create(merged, frozenset(explicit))
    except ValidationError as error:
        raise UserError(explain_values(error, origin)) from None
    return _with_room_for_the_tokenizer(config)


def _goes_on_from(given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """`_settings_of` the run that is resumed, empty where there is none or `auto` begins it; and what the run begins
    with, or began with where it is resumed without naming that again. `given`: what the user wrote down."""
    began, resume = given.get("init_from"), given.get("resume")
    own: dict[str, Any] = {}
    if resume is not None:
        folder, has_checkpoint = _resumed(str(resume), given)
        own = _settings_of(folder) if has_checkpoint else {}
        began = _began_with(folder) if began is None else began
    return own, began if isinstance(began, str) else None


def _long_form(
    text: str, merged: Mapping[str, Any], file_values: Mapping[str, Any], own: Mapping[str, Any], began: str | None
) -> dict[str, Any] | None:
    """The setting `rope_scaling` for its short form; `own`, `began`: of `_goes_on_from`. Of a run that is resumed its
    own stands, where it may have been given so: nothing can be counted from its seq_length, which is the longer one."""
    before = own
    begins = merged.get("resume") is None or merged.get("init_from") is not None
    if not before and not begins and isinstance(file_values.get("rope_scaling"), Mapping):
        before = file_values  # as a run wrote it that has no checkpoint yet
    scaling = before.get("rope_scaling")
    if before and is_short_for(text, scaling):
        return dict(scaling) if scaling else None
    return rope_scaling_of(text, merged.get("seq_length"), (trained_as(began) if began is not None else {}) or before)


def _resumed(resume: str, given: Mapping[str, Any]) -> tuple[Path, bool]:
    """The folder of the run that is resumed, and whether it has a checkpoint; without one, `auto` begins it."""
    if resume != "auto":
        config = run_config(resume)
        return (Path(resume) if config is None else config.parent), True
    folder = Path(*(str(given.get(key, Config.model_fields[key].default)) for key in ("output_dir", "experiment_name")))
    return folder, any((folder / "checkpoints").glob("step-*"))


def _began_with(run: Path) -> str | None:
    """What the last start of the run in this folder began with, by its run.json; None for weights that were drawn, or
    where that is lost."""
    try:
        began = read_json(run / "run.json")["config"]["init_from"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return began if isinstance(began, str) else None


def _lower_the_floor(merged: dict[str, Any], explicit: Mapping[str, Any]) -> None:
    """A floor of the learning rate that nobody set stays below the rate: at a hundredth of it, as by default."""
    rate = merged.get("learning_rate")
    floor = merged.get("min_lr", Config.model_fields["min_lr"].default)
    if "min_lr" not in explicit and isinstance(rate, int | float) and 0 < rate < floor:
        merged["min_lr"] = rate / 100


def _base(preset_or_yaml: str, resuming: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, int], str]:
    """Preset values, the file's own values, the line of each of its keys, and the file's name for messages."""
    if preset_or_yaml in PRESETS:
        return _read_preset(preset_or_yaml), {}, {}, ""
    path = Path(preset_or_yaml)
    if not path.is_file():
        if path.exists() and not (path.is_dir() and path.suffix not in {".yaml", ".yml"}):
            raise UserError(f"{path} is a folder, a pipe or a device, not a configuration file")
        looks_like_a_name = path.suffix not in {".yaml", ".yml"} and path.parent == Path()
        if looks_like_a_name:
            raise UserError(
                f"no preset and no file is called `{preset_or_yaml}`.{did_you_mean(preset_or_yaml, PRESETS)}",
                f"Presets: {', '.join(PRESETS)}; or give the path of a YAML file.",
            )
        raise UserError(f"no such configuration file: {preset_or_yaml}")
    try:
        text = read_text(path, MOST_YAML)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    values, lines = parse_settings(text, str(path))
    preset = values.pop("preset", DEFAULT_PRESET)
    if preset not in PRESETS:
        hint = did_you_mean(str(preset), PRESETS)
        raise UserError(f"{path}, line {lines['preset']}: no preset is called `{preset}`.{hint}")
    for name in values:
        _check_key(name, f"{path}, line {lines[name]}")
    _drop_one_starts(values, lines, path, resuming)
    _find_tokenizer(values, path.parent)
    if (path.parent / "checkpoints").is_dir():
        _name_template(values)
    return _read_preset(preset), values, lines, str(path)


def _drop_one_starts(values: dict[str, Any], lines: Mapping[str, int], path: Path, resuming: bool) -> None:
    """Take `resume` out of a file's values, and `init_from` of one that a run wrote (up to 0.2.0, with `resume` in it):
    they belong to one start, and a copy of the file would go on with the other run. Said, unless the start resumes. And
    trained_seq_length of a file that a run wrote, of weights that another need not begin with; it has every setting."""
    if not resuming and {"init_std", "adam_eps", "plateau_gain", "keep_last"} <= values.keys():
        values.pop("trained_seq_length", None)
    by_a_run = {"resume", "experiment_name", "output_dir", "keep_last"} <= values.keys()
    for name, flag in (("resume", "--resume"), ("init_from", "--init-from")):
        if name == "init_from" and not by_a_run:
            continue
        given = values.pop(name, None)
        if given is not None and not resuming:
            log.warning(
                "%s, line %d: `%s: %s` belongs to one start and is not taken from a file; if you mean it: %s %s",
                path, lines[name], name, given, flag, given,
            )  # fmt: skip


def _find_tokenizer(values: dict[str, Any], folder: Path) -> None:
    """A tokenizer's folder is looked for beside the file that names it, so that a run's folder can be moved."""
    given = values.get("tokenizer")
    if isinstance(given, str) and (folder / given).is_dir():
        values["tokenizer"] = str(folder / given)


def _name_template(values: dict[str, Any]) -> None:
    """The settings of a run of version 0.2.0 or earlier name no chat template: they had the first."""
    if "chat_template" not in values and values.get("tokenizer") is None:
        values["chat_template"] = FIRST_TEMPLATE


def run_config(given: str) -> Path | None:
    """config.yaml of the run that a path means (its folder, a checkpoint, or a file in one), if it is there."""
    start = Path(given)
    folders = (start, *list(start.parents)[:3])
    return next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)


def inherited(given: str, context_length: int) -> dict[str, Any]:
    """What a run that begins with another's weights takes over: `trained_as`, but for a seq_length above
    `context_length`, since a long context costs memory that fine-tuning seldom needs; trained_seq_length keeps it."""
    taken = trained_as(given)
    taken["trained_seq_length"] = trained_length(taken)
    if isinstance(taken.get("seq_length"), int) and taken["seq_length"] > context_length:
        taken["seq_length"] = context_length
    return taken


def trained_as(given: str) -> dict[str, Any]:
    """`_settings_of` a run whose weights another begins with, with the longest context of what it began with itself.
    Nothing when there is no such run: whoever reads its weights says so."""
    path = run_config(given)
    return {} if path is None else _with_length(_settings_of(path.parent), path.parent)


def _settings_of(run: Path) -> dict[str, Any]:
    """The model's settings by the config.yaml in a run's folder, and its tokenizer or chat template. Raises UserError
    where that cannot be read."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values, _ = parse_settings(read_text(path, MOST_YAML), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    _find_tokenizer(values, run)
    _name_template(values)
    kept = (*ModelConfig.model_fields, "tokenizer", "chat_template", "trained_seq_length")
    return {name: values[name] for name in kept if name in values}


def _with_length(taken: dict[str, Any], run: Path, links: int = 8) -> dict[str, Any]:
    """`_settings_of` the run, with trained_seq_length where an earlier version wrote none: by what it began with,
    `links` runs back at most. Of a run that is gone, or that cannot be read here, it is not known."""
    if taken.get("trained_seq_length") is None and links and (began := _began_with(run)) is not None:
        start = Path(began)  # not `run_config`: above a folder that is gone there are other people's files
        before = next((f.parent for f in (start, start.parent) if f.name == "checkpoints"), start)
        with suppress(OSError, ValueError, UserError):
            taken["trained_seq_length"] = trained_length(_with_length(_settings_of(before), before, links - 1))
    return taken


def _read_preset(name: str) -> dict[str, Any]:
    text = resources.files("lumina.config").joinpath(f"presets/{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, f"preset {name}")[0]


def parse_settings(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """`parse_yaml`, with the settings under today's names."""
    values, lines = parse_yaml(text, where)
    return upgrade(values, where), {new_name(name): line for name, line in lines.items()}


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A flat YAML mapping and the 1-based line of each key. Raises UserError on bad YAML, nesting of the document in
    anything but a mapping, and a key given twice (YAML would silently keep the last)."""
    with _composed(text, where) as (loader, node):
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where} is not a mapping of `key: value` lines")
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            line = key_node.start_mark.line + 1
            if key in lines:
                raise UserError(f"{where}, line {line}: `{key}` was already given on line {lines[key]}")
            lines[key] = line
            values[key] = loader.construct_object(value_node, deep=True)
        return values, lines


@contextmanager
def _composed(text: str, where: str) -> Iterator[tuple[_Loader, yaml.Node | None]]:
    """A loader and the one document of a YAML text, None where it is empty; within the block too, what is not valid
    YAML is a UserError."""
    loader = None
    if len(text) > MOST_YAML:
        raise UserError(f"{where} has more than {MOST_YAML:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _refuse_bomb(node, where)
        yield loader, node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{where}{at}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's own: the 32nd of a month, `!!int _`, a number of thousands of digits
        raise UserError(f"{where}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_bomb(root: yaml.Node, where: str) -> None:
    """UserError for more than MOST_VALUES values, each counted as often as aliases repeat it: a few lines of aliases of
    aliases stand for billions, which merging, comparing or printing them would go through."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")  # for an alias of what it stands in
            inner = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UserError(f"{where} holds more than {MOST_VALUES:,} values, with what its aliases (*name) repeat")


def _check_key(name: str, where: str) -> None:
    if name in Config.model_fields:
        return
    meant = SYNONYMS.get(name.lower().replace("-", "_"))
    hint = f" Did you mean `{meant}`?" if meant else did_you_mean(name, Config.model_fields)
    raise UserError(f"{where}: unknown key `{name}`.{hint}")


def _parse_set(pair: str) -> dict[str, Any]:
    """The one setting of a --set pair."""
    name, equals, text = pair.partition("=")
    name = name.strip()
    if not equals:
        raise UserError(f"--set {pair}: expected key=value, such as --set learning_rate=3e-4")
    _check_key(new_name(name), f"--set {pair}")
    with _composed(text, f"--set {pair}") as (loader, node):
        value = None if node is None else loader.construct_document(node)
    return upgrade({name: value}, f"--set {pair}")


def _with_room_for_the_tokenizer(config: Config) -> Config:
    if config.tokenizer is not None or config.vocab_size >= MIN_VOCAB:
        return config
    log.warning(
        "vocab_size %d is smaller than the tokenizer's %d ids (cl100k_base and the special tokens): raised to %d",
        config.vocab_size, MIN_VOCAB, MIN_VOCAB,
    )  # fmt: skip
    return config.replace(vocab_size=MIN_VOCAB)
