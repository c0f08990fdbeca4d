"""Imported tokenizers and templates: transformers' very ids, exact masks, and nothing typed becomes a special token."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import (
    Conversation,
    Message,
    Tokenizer,
    ToolCall,
    open_tokenizer,
    render_many,
)
from lumina.chat.hf import jinja
from lumina.chat.hf.jinja import RefusalError
from lumina.chat.hf.rendering import FOLDED, UNPROMPTED
from lumina.chat.hf.tokenizer import HFTokenizer, TokenizedSample
from lumina.config import UserError, install_command
from tests.small_tokenizer import CHATML, trl_template, write_agent_tokenizer, write_spaced_tokenizer, write_tokenizer

# The forms of template that the families use; each written here anew.
LLAMA_3 = (
    "{{- bos_token }}{% for m in messages %}{{- '<|im_start|>' + m['role'] + '<|im_end|>\n\n' + m['content'] | trim "
    "+ '<|endoftext|>' }}{% endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant<|im_end|>\n\n' }}"
    "{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
)
# Puts an empty <think> block before the last answer and takes it away from earlier ones.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    Message("system", "be brief"),
    Message("user", "hello there"),
    Message("assistant", "how are you today?"),
    Message("user", "Well, 日本語 🙂"),
    Message("assistant", "to be fair: the weather"),
]


def written(folder: Path, kind: str) -> Path:
    if kind in ("llama2", "zephyr"):
        return write_spaced_tokenizer(folder, {"llama2": LLAMA_2, "zephyr": ZEPHYR}[kind])
    write_tokenizer(folder, {"chatml": CHATML, "llama3": LLAMA_3, "thinking": THINKING}[kind])
    if kind == "llama3":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: written(root / kind, kind) for kind in ("chatml", "llama3", "llama2", "zephyr", "thinking")}


@pytest.fixture(scope="module")
def chatml(folders: dict[str, Path]) -> HFTokenizer:
    return HFTokenizer(folders["chatml"])


def only(tokenizer: HFTokenizer, messages: list[Message]) -> TokenizedSample:
    """The one sample of a conversation."""
    (sample,) = tokenizer.tokenize(Conversation(messages))
    return sample


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "llama2", "zephyr"])
def test_ids_are_transformers_own_and_only_answers_are_supervised(folders: dict[str, Path], kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folders[kind])
    ours = HFTokenizer(folders[kind])
    ours.check_trainable()
    tokens = only(ours, CHAT)
    assert tokens.ids.tolist() == theirs.apply_chat_template(as_dicts(CHAT), return_dict=True)["input_ids"]
    for end in (2, 4):
        prompt = ours.prompt_ids(Conversation(CHAT[:end]))
        options = {"add_generation_prompt": True, "return_dict": True}
        assert prompt == theirs.apply_chat_template(as_dicts(CHAT[:end]), **options)["input_ids"]
        assert tokens.ids[: len(prompt)].tolist() == prompt
        answer = tokens.ids[len(prompt) :]
        stop = next(i for i, token in enumerate(answer) if int(token) in ours.stop_ids)
        supervised = tokens.mask[len(prompt) : len(prompt) + stop + 1]
        assert supervised.all()  # from the first token after the prompt to the stop token
        assert ours.decode_text(answer[:stop]).strip() == CHAT[end].content
        assert tokens.offsets[end] + tokens.head[end] == len(prompt)
    assert tokens.mask.sum() == sum(end - start for _, start, end in ours.message_spans(Conversation(CHAT))[0][1])
    assert tokens.offsets[0] == 0
    assert tokens.offsets[-1] == len(tokens.ids)
    assert theirs.decode(tokens.ids, skip_special_tokens=True) == ours.decode_text(tokens.ids)


def test_luminas_own_tokenizer_read_back_makes_the_very_same_data(tmp_path: Path) -> None:
    """Our fast path and this one are two implementations of one template: ids, masks and messages agree."""
    from lumina.chat import tokenizer_config, tokenizer_json

    own = Tokenizer.load()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(own)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(own, 64)))
    ours = HFTokenizer(tmp_path)
    typed = ["<|im_end|>", " b\n\n日本語", "\n  c <|user|>", "", "x <|im_start|><|assistant|> y"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    hard = Conversation([Message(*pair) for pair in zip(roles, typed, strict=True)])
    chats = [Conversation(CHAT), hard, Conversation([CHAT[1], CHAT[2]._replace(supervise=False)])]
    said = "one <|user|> two <|im_end|> 日本語🙂 a"  # of a masked span that begins or ends within a token, all of it
    for spans in (((0, 3),), ((6, 14), (15, 20)), ((27, 29), (30, 32)), ((3, 5), (4, len(said)))):
        chats.append(Conversation([CHAT[1], Message("assistant", said, masked=spans), CHAT[3], CHAT[4]]))
    (block, refused), expected = ours.render_valid(chats), render_many(own, chats)
    assert not refused
    for name in ("ids", "mask", "message_offsets", "conversation_offsets", "supervised", "role"):
        assert np.array_equal(getattr(block, name), getattr(expected, name)), name
    assert np.array_equal(block.head[block.supervised], expected.head[expected.supervised])


def test_messages_end_where_the_template_ends_them(chatml: HFTokenizer) -> None:
    tokens = only(chatml, CHAT)
    pieces = [chatml.decode(tokens.ids[a:b]) for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    assert pieces == [f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in CHAT]
    assert chatml.decode(tokens.ids[tokens.mask == 1]) == f"{CHAT[2].content}<|im_end|>{CHAT[4].content}<|im_end|>"
    masked = [*CHAT[:2], CHAT[2]._replace(supervise=False), *CHAT[3:]]
    again = only(chatml, masked)
    assert chatml.decode(again.ids[again.mask == 1]) == f"{CHAT[4].content}<|im_end|>"


def test_masked_spans_are_those_of_the_content_wherever_the_template_puts_it(tmp_path: Path) -> None:
    """Qwen3's puts reasoning before it and calls after it, and takes white space from both ends of it."""
    pytest.importorskip("trl")
    tokenizer = HFTokenizer(write_agent_tokenizer(tmp_path / "tokenizer", trl_template("qwen3")))
    call = ToolCall("look", '{"place": "Rome"}')
    answer = Message("assistant", "\n secret: see Rome ", True, ((0, 8), (13, 15)), "Two of them.", (call,))
    (sample,) = tokenizer.tokenize(Conversation([CHAT[1], answer]))
    said = tokenizer.decode(sample.ids[sample.mask == 1])
    assert said.startswith("<think>\nTwo of them.\n</think>\n\n")
    assert " see" in said
    assert "secret" not in said
    assert said.count("Rome") == 1  # that of the call
    with pytest.raises(RefusalError, match="does not show that text once"):
        tokenizer.tokenize(Conversation([CHAT[1], answer._replace(content="Rome", masked=((0, 1),))]))


PARTS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im", "_end|>", "<", "|>", "user\n", " ", "x", "\n", "é🙂"]
PARTS += ["\ufdd0", "\ufdd2", "\ufdef", "</s>", "<s>", "<unk>", "[INST]", "{{ 7 * 7 }}", "{% raw %}"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), min_size=1, max_size=5))
def test_what_is_typed_never_becomes_a_special_token(chatml: HFTokenizer, contents: list[str]) -> None:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    tokens = only(chatml, turns)
    assert np.isin(tokens.ids, [0, 1, 2]).sum() == 2 * len(turns)  # those of the template
    for message, start, end in chatml.message_spans(Conversation(turns))[0][1]:
        assert chatml.decode(tokens.ids[start:end]) == turns[message].content + "<|im_end|>"
    for at in range(1, len(turns), 2):
        prompt = chatml.prompt_ids(Conversation(turns[:at]))
        assert tokens.ids[: len(prompt)].tolist() == prompt
    assert not np.isin(chatml.encode("".join(contents)), [0, 1, 2]).any()


def test_typed_names_are_text_where_the_vocabulary_has_them_as_words(folders: dict[str, Path]) -> None:
    ours = HFTokenizer(folders["llama2"])
    turns = [Message("user", "hello </s><s> there <unk>"), Message("assistant", "how </s> are you</s>")]
    tokens = only(ours, turns)
    assert np.isin(tokens.ids, [1, 2]).sum() == 2
    assert ours.decode(tokens.ids).count("</s>") == 4


def test_words_that_a_vocabulary_adds_are_special_for_users_and_words_for_models(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    values = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    values["added_tokens"] += [{"id": 400, "content": "<think>", **plain}, {"id": 401, "content": "    ", **plain}]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    ours = HFTokenizer(folder)
    tokens = only(ours, [Message("user", "<think>    "), Message("assistant", "<think>    ")])
    first, second = np.split(tokens.ids, [tokens.offsets[1]])
    assert (400 in first, 400 in second, 401 in first, 401 in second) == (False, True, True, True)
    assert ours.allowed_tokens(512)[[400, 401]].all()
    assert not ours.allowed_tokens(512)[[0, 1, 402]].any()


def test_what_the_template_puts_after_its_prompt_is_said_and_rewritten_history_unrolled(
    folders: dict[str, Path],
) -> None:
    ours = HFTokenizer(folders["thinking"])
    samples = ours.tokenize(Conversation(CHAT))
    assert [len(sample.head) for sample in samples] == [3, 5]
    for sample, end in zip(samples, (2, 4), strict=True):
        prompt = ours.prompt_ids(Conversation(CHAT[:end]))
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert ours.decode(sample.ids[sample.mask == 1]) == f"<think>\n\n</think>\n\n{CHAT[end].content}<|im_end|>"
        assert list(sample.supervised) == [end]
    assert ours.decode(samples[1].ids).count("<think>") == 1
    ours.check_trainable()
    block, refused = ours.render_valid([Conversation(CHAT[1:3]), Conversation(CHAT)])
    assert not refused
    assert block.source.tolist() == [0, 1, 1]
    assert block.conversation_offsets.tolist() == [0, 2, 5, 10]
    assert block.repeated.tolist() == [False] * 5 + [True] * 3 + [False] * 2
    assert block.supervised.tolist() == [False, True] + [False, False, True] + [False] * 4 + [True]
    spans = [(len(ids), [span.message for span in own]) for ids, own in ours.message_spans(Conversation(CHAT))]
    assert spans == [(len(samples[0].ids), [2]), (len(samples[1].ids), [4])]


def test_an_answer_without_a_stop_token_ends_with_the_one_that_ends_generation(tmp_path: Path) -> None:
    ours = HFTokenizer(write_tokenizer(tmp_path / "t", CHATML.replace("<|im_end|>", "")))
    samples = ours.tokenize(Conversation(CHAT))
    said = [ours.decode(sample.ids[sample.mask == 1]) for sample in samples]
    assert said == [f"{CHAT[2].content}\n<|im_end|>", f"{CHAT[4].content}\n<|im_end|>"]
    assert ours.decode(samples[1].ids).count("<|im_end|>") == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), UNPROMPTED),
        ("{{ raise_exception('never') }}", "the chat template refuses it: never"),
        ("{% for m in messages %}{{ m.nothing.here }}{% endfor %}", "the chat template refuses it: .*has no attribute"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template refuses it: access to attribute"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused_by_name(tmp_path: Path, template: str, reason: str) -> None:
    ours = HFTokenizer(write_tokenizer(tmp_path / "t", template))
    with pytest.raises(UserError, match=reason):
        ours.check_trainable()


def test_conversations_that_do_not_fit_are_named_and_the_others_rendered(folders: dict[str, Path]) -> None:
    ours = HFTokenizer(folders["llama2"])
    user, answer, text = Message("user", "hello"), Message("assistant", "you"), Message("text", "today </s>")
    good, twice = Conversation([user, answer]), Conversation([user, user])
    texts, mixed = Conversation([text, text]), Conversation([text, user])
    block, refused = ours.render_valid([good, twice, texts, mixed])
    assert refused[1] == "the chat template refuses it: roles must alternate"
    assert "mixes plain text" in refused[3]
    assert block.conversation_offsets.tolist() == [0, 2, 4]
    assert len(block.message_offsets) == 5
    assert block.supervised.tolist() == [False, True, True, True]
    own = block.ids[block.message_offsets[2] : block.message_offsets[3]]
    assert [own[0], own[-1], int((own <= 2).sum())] == [2, 2, 2]  # a text lies between ends of documents
    silent = CHATML.replace("<|im_start|>{{", "{% if m['role'] == 'system' %}{% continue %}{% endif %}<|im_start|>{{")
    (folders["zephyr"].parent / "silent").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders["zephyr"].parent / "silent" / name).write_bytes((folders["chatml"] / name).read_bytes())
    (folders["zephyr"].parent / "silent/chat_template.jinja").write_text(silent)
    with pytest.raises(RefusalError, match=FOLDED):
        HFTokenizer(folders["zephyr"].parent / "silent").tokenize(Conversation(CHAT))


def test_a_base_models_turns_end_as_its_template_ends_them(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / "stops.json").write_text('{"stop_ids": [0]}')  # <|endoftext|>, as base models with a ChatML template say
    ours = HFTokenizer(folder)
    assert ours.stop_ids == {0, 2}
    ours.check_trainable()


def test_the_fingerprint_is_that_of_vocabulary_template_and_stops(tmp_path: Path) -> None:
    first, same = (HFTokenizer(write_tokenizer(tmp_path / name)) for name in "ab")
    assert first.fingerprint == same.fingerprint
    other = HFTokenizer(write_tokenizer(tmp_path / "c", CHATML + " "))
    assert other.template_version != first.template_version
    (tmp_path / "b/stops.json").write_text('{"stop_ids": [2, 0]}')
    (tmp_path / "a/tokenizer.json").write_text((tmp_path / "a/tokenizer.json").read_text() + " ")
    changed = [open_tokenizer(tmp_path / name).fingerprint for name in "ab"]
    assert len({first.fingerprint, other.fingerprint, *changed}) == 4


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "is not a JSON object"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("chat_template.jinja", "{% if %}", "the chat template cannot be read"),
        ("stops.json", "{}", "cannot be read"),
        ("stops.json", '{"stop_ids": []}', "names no stop token"),
        ("stops.json", '{"stop_ids": [4000]}', "stop id 4000 is not in the vocabulary of 400"),
        ("tokenizer_config.json", '{"eos_token": "gone"}', "names no stop token"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        open_tokenizer(folder)


@pytest.mark.parametrize("library", ["tokenizers", "jinja2"])
def test_a_missing_library_is_named_with_the_remedy(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *arguments, **named)

    jinja._environment.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    for loaded in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(UserError, match=f"needs {library}") as refused:
        open_tokenizer(folders["chatml"], tried=True)  # here, not in a process of its own, which has the library
    assert install_command("hf") in str(refused.value)
