"""The vocabulary of fields: what every key of a record or message is for, and the count of what was met (law 4).

A key is *used* by the format that reads it, *harmless* (ids, scores, times: nothing that a model could learn),
*content* (it holds words or says what is supervised), or unknown. Content that a format has no place for is
never left out in silence: a record that holds some is refused under the key's name, unless the field is empty or
repeats what is used. Unknown keys are counted, with an example of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lumina.chat import Message
from lumina.data.records.fault import NOT_TO_BE_TAUGHT, Fault
from lumina.data.records.flags import FLAGS, MASKS, VERDICTS, is_no, says_not_to_learn

NOT_USED = "field not used"

CONTENT = frozenset(
    {
        *("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "history", "system"),
        *("system_prompt", "instruction", "input", "output", "context", "prompt", "response", "completion", "question"),
        *("query", "answer", "answers", "text", "content", "value", "chosen", "rejected", "tools", "functions"),
        *("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "thoughts", "refusal"),
        *("documents", "passages", "image", "images", "audio", "audios", "video", "videos", "mask", "train_detail"),
        *("choices", "options", "document", "passage", "article", "persona", "system_message", "instructions"),
        *("chat_history", "available_tools", "thought", "think", "cot", "chain_of_thought", "reasoning_details"),
        *("tool_call", "chat_template_kwargs", "enable_thinking", "rationale", "segments"),
        *("thinking_blocks", "parts", "contents", "system_instruction", "additional_kwargs", "invalid_tool_calls"),
        *("tool_use", "tool_uses", "tool_result", "tool_results", "function_response", "observation", "observations"),
        *("preferred_output", "non_preferred_output", "train_on_input", "train_on_inputs", *FLAGS, *MASKS),
        *("background", "knowledge", "evidence", "conversation_history", "dialog_history", "dialogue_history"),
        *("message_history", "previous_messages", "few_shot", "demonstrations", "user_prompt", "user_input"),
        *("retrieved_document", "retrieved_context", "search_result", "tool_definition", "function_definition"),
        *("tool_schema", "available_functions", "reasoning_text", "reasoning_trace", "thinking_content"),
        *("think_content", "thought_process", "scratchpad", "image_url", "image_path", "audio_url", "audio_path"),
        *("video_url", "video_path", "attachment", "tool_output", "tool_response", "function_result"),
    }
)
# What tells formats apart: where a source's format is given, those of the others are set aside on purpose.
OF_FORMATS = frozenset(
    {
        *("messages", "conversations", "conversation", "text", "prompt", "instruction", "question", "query"),
        *("output", "response", "completion", "answer", "chosen", "rejected"),
    }
)
HARMLESS = frozenset(
    {
        *("id", "_id", "idx", "index", "uuid", "uid", "guid", "key", "hash", "name", "title", "url", "link", "source"),
        *("dataset", "origin", "split", "subset", "category", "categories", "task", "topic", "topics", "tags", "tag"),
        *("domain", "subject", "difficulty", "license", "model", "model_name", "generator", "provider", "author"),
        *("lang", "language", "languages", "timestamp", "date", "time", "created", "created_at", "created_date"),
        *("create_time", "update_time", "updated_at", "score", "scores", "rank", "ranks", "rating", "ratings", "votes"),
        *("likes", "upvotes", "quality", "toxicity", "toxic", "perplexity", "meta", "metadata", "info", "extra"),
        *("usage", "finish_reason", "stop_reason", "logprobs", "token_count", "num_tokens", "num_turns", "turn"),
        *("length", "n_tokens", "status", "version", "user_id", "annotator", "worker_id", "session_id", "thread_id"),
        *("conversation_id", "conv_id", "dialog_id", "dialogue_id", "prompt_id", "message_id", "message_ids"),
        *("score_chosen", "score_rejected", "chosen_score", "rejected_score", "margin", "chosen_rating"),
        *("rejected_rating", "chosen_model", "rejected_model"),
        *("parent_id", "tree_id", "message_tree_id", "tool_call_id", "redacted", "moderation", *VERDICTS),
        *("openai_moderation", "detoxify", "country", "state", "hashed_ip", "header", "sender", "type",
        "__index_level_0__", "call_id", "tool_use_id", "tool_name", "tool_choice", "parallel_tool_calls", "signature",
        "is_error", "cache_control"),
    }
)  # fmt: skip

_SEPARATORS = str.maketrans("", "", "_- .")
_PLAIN = {name.translate(_SEPARATORS): name for name in sorted(HARMLESS | CONTENT)}
_EMPTY_JSON = ("[]", "{}", "null")  # in a column of texts
_SAYS_BY_FALSE = frozenset({*FLAGS, *MASKS, "mask", "chat_template_kwargs", "enable_thinking"})
RENDERINGS = ("text", "prompt")  # may hold a conversation's messages with a template's words around them

MOST_KEY_SETS = 1000  # sets of keys remembered at a time: records may have any
MOST_NAMES = 200  # unknown names counted by themselves
MOST_CHARACTERS = 80  # of a name that the data gives, in accounts and reports
OTHERS = "(others)"


def plain_name(key: str) -> str:
    """A key as the vocabulary spells it: toolCalls, System, "chat history", contexts."""
    bare = key.lower().translate(_SEPARATORS)
    if bare in _PLAIN:
        return _PLAIN[bare]
    one = _PLAIN.get(bare.removesuffix("s"), key)  # several of what is content are content too
    return one if one in CONTENT else key


@dataclass(frozen=True)
class Vocabulary:
    """The keys that one format's records, or messages, use."""

    name: str
    used: frozenset[str]

    def sort(self, key: str) -> str:
        """used, harmless, content or unknown."""
        if key in self.used:
            return "used"
        plain = plain_name(key)
        return "content" if plain in CONTENT else "harmless" if plain in HARMLESS else "unknown"


@dataclass
class _KeySet:
    """One set of keys: which of them are content without a place or unknown, and how often it was met."""

    sorts: dict[str, str]
    content: tuple[str, ...]
    unknown: tuple[str, ...]
    verdicts: tuple[str, ...]
    plain: bool  # every key is used or harmless, whatever its value
    count: int = 0


@dataclass
class FieldTally:
    """Counts of the fields that one reader met, by sort and name.

    `dropped`: messages left out of records that are used, by reason; `left_out` those of the record being read, whose
    number is `line`. `format_given`: the user says what the records are.
    """

    line: int = 0
    format_given: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    tools: list[tuple[str, ...]] = field(default_factory=list)  # that system messages of the record being read declare
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)  # of unknown keys: record, value
    # Messages of two keys, role and content or from and value: too many to look their keys up.
    plain_messages: int = 0
    plain_turns: int = 0
    _counts: dict[str, Counter[str]] = field(default_factory=dict)
    _key_sets: dict[tuple[Any, ...], _KeySet] = field(default_factory=dict)

    def count(self, vocabulary: Vocabulary, held: Mapping[str, Any], messages: Sequence[Message] = ()) -> Fault | None:
        """Count the keys of a record or message, or say why it cannot be used. `messages` are what it became: a field
        that only repeats them loses nothing."""
        keys = self._key_sets.get((id(vocabulary), *held))
        if keys is None:
            keys = self._key_set_of(vocabulary, held)
        if keys.plain:  # by far the most frequent
            keys.count += 1
            return None
        for name in keys.content:
            value = held[name]
            if _says_nothing(name, value):
                continue
            if type(value) is str and value.strip() in _EMPTY_JSON:
                continue
            if self.format_given and name in OF_FORMATS:
                self._add("set aside", name)
                self._add("empty or repeated", name, -1)  # as which the set of keys counts it
                continue
            if not repeats(value, messages, rendering=name in RENDERINGS):
                self._add("refused", name)
                what = f"`{shortened(name)}` has no place in {vocabulary.name}"
                what += "; a source's `format` sets it aside" if name in OF_FORMATS else ""
                return Fault(f"{NOT_USED}: {shortened(name)}", what, len(messages))
        for name in keys.unknown:
            if says_not_to_learn(name, held[name]):
                self._add("refused", name)
                what = f"`{shortened(name)}` reads like a flag of training"
                return Fault(f"{NOT_USED}: {shortened(name)}", what, len(messages))
            if len(self.examples) < MOST_NAMES and shortened(name) not in self.examples:
                self.examples[shortened(name)] = self.line, repr(str(held[name])[:60])
        for name in keys.verdicts:
            # A number is also a class's, where a record is no prompt with its completion.
            number = plain_name(name) != "label" or "completion" in vocabulary.used
            if is_no(held[name], number):
                self._add("refused", name)
                return Fault(NOT_TO_BE_TAUGHT, f"`{shortened(name)}` is {held[name]!s:.20}", len(messages))
        keys.count += 1
        return None

    def end_record(self, used: bool) -> None:
        """The record is read: what was left out of it counts if it is used; else the whole of it is skipped."""
        if self.left_out:
            if used:
                self.dropped.update(self.left_out)
            self.left_out.clear()

    def _key_set_of(self, vocabulary: Vocabulary, held: Mapping[str, Any]) -> _KeySet:
        """A set of keys that was not met before, or not lately."""
        if len(self._key_sets) >= MOST_KEY_SETS:
            self._fold()
        sorts = {str(name): vocabulary.sort(str(name)) for name in held}
        content = tuple(name for name, sort in sorts.items() if sort == "content")
        unknown = tuple(name for name, sort in sorts.items() if sort == "unknown")
        verdicts = tuple(name for name in sorts if plain_name(name) in VERDICTS)
        keys = _KeySet(sorts, content, unknown, verdicts, plain=not (content or unknown or verdicts))
        self._key_sets[(id(vocabulary), *held)] = keys
        return keys

    def set_aside(self, name: str) -> None:
        """Counts a field that the user says is not meant."""
        self._add("set aside", name)

    def _add(self, sort: str, name: str, count: int = 1) -> None:
        name, names = shortened(name), self._counts.setdefault(sort, Counter())
        names[name if name in names or len(names) < MOST_NAMES else OTHERS] += count

    def _fold(self) -> None:
        for keys in self._key_sets.values():
            for name, sort in keys.sorts.items():
                if keys.count:
                    self._add("empty or repeated" if sort == "content" else sort, name, keys.count)
        self._key_sets.clear()

    def totals(self) -> dict[str, dict[str, int]]:
        """Counts by sort and name: used, harmless, empty or repeated, unknown, refused."""
        self._fold()
        for name, count in zip(
            ("role", "content", "from", "value"), (self.plain_messages,) * 2 + (self.plain_turns,) * 2, strict=True
        ):
            if count:
                self._add("used", name, count)
        self.plain_messages = self.plain_turns = 0
        counted = {sort: {name: n for name, n in names.items() if n} for sort, names in self._counts.items()}
        return {sort: names for sort, names in counted.items() if names}


def shortened(name: str) -> str:
    """A name that the data gives, which may be a text of any length, as accounts and reports have it."""
    return name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…"


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field that has no place is empty, or is a flag that changes nothing."""
    plain = plain_name(name)
    if plain not in _SAYS_BY_FALSE:
        return is_empty(value)
    if value in (None, "", [], {}):
        return True
    return value in (1, True) if plain in FLAGS else plain in MASKS and value in (0, False)


def is_empty(value: Any) -> bool:
    """Whether a field is empty: null, no text, or lists and objects of nothing else."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return isinstance(value, dict) and all(map(is_empty, value.values()))


def repeats(value: Any, messages: Sequence[Message], rendering: bool = False) -> bool:
    """Whether a field holds nothing but what the messages say: a message's text, as a `prompt` beside a conversation
    does, or the messages themselves; or, for a `rendering` of several messages, all of them in one text."""
    if isinstance(value, str):
        text = value.strip()
        if any(text in (message.content.strip(), message.reasoning.strip()) for message in messages):
            return True
        if not rendering or len(messages) < 2:
            return False
        return all(part.strip() in text for message in messages for part in _texts(message))
    if isinstance(value, list | tuple):
        return bool(messages) and all(is_empty(part) or repeats(part, messages) for part in value)
    if isinstance(value, dict) and set(value) <= {"role", "from", "content", "value"}:
        said = value.get("content", value.get("value"))
        return isinstance(said, str) and repeats(said, messages)
    return False


def _texts(message: Message) -> Iterator[str]:
    """What a rendering of the message has to have in it; of arguments it may write the JSON in another way."""
    yield message.content
    yield message.reasoning
    yield from (call.name for call in message.tool_calls)


def one_of(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, bool]:
    """The first of several keys for one thing that a record has a value for, null and nothing aside; and whether
    another of them has a different one, so that what is meant cannot be told."""
    first: str | None = None
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if first is None:
            first = name
        elif is_empty(record[first]):
            first = name if not is_empty(value) else first
        elif not is_empty(value) and value != record[first]:
            return first, True
    return first, False
