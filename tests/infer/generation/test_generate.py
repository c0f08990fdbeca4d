"""Generation with a cache against recomputation without one, and against transformers."""

from __future__ import annotations

import pytest
import torch

from lumina.chat import Conversation, Message, Tokenizer
from lumina.config import UserError
from lumina.infer import Sampling, generate, stream
from lumina.infer.generation.sampling import forbidden_tokens
from lumina.model import Transformer, cpu
from lumina.model.cache import KVCache
from lumina.model.decode import Decoder, Shortlist
from tests.infer.small_models import as_transformers, make_model

TOKENIZER = Tokenizer.load()
GREEDY = Sampling(temperature=0, max_length=16)
PROMPTS = [
    TOKENIZER.prompt_ids(Conversation([Message("user", text)]))
    for text in ("Hello", "What is the tallest mountain, and how tall is it?", "Tell me a story. " * 12, "No.")
]


def recomputed(model: Transformer, prompt: list[int], max_length: int) -> list[int]:
    """Greedy continuation by whole forward passes, the stop token included."""
    ids, forbidden_V = list(prompt), forbidden_tokens(TOKENIZER, model.config.vocab_size)
    for _ in range(min(max_length, model.config.seq_length - len(prompt))):
        tensor = torch.tensor([ids])
        logits_V = model(tensor, torch.arange(len(ids))[None])[0, -1]
        ids.append(int(logits_V.masked_fill(forbidden_V, -torch.inf).argmax()))
        if ids[-1] == TOKENIZER.stop_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_equals_recomputation_token_for_token(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    together = generate(model, TOKENIZER, PROMPTS, GREEDY)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer.ids == recomputed(model, prompt, 16)
        assert generate(model, TOKENIZER, [prompt], GREEDY)[0].ids == answer.ids
    assert len({tuple(answer.ids) for answer in together}) == len(PROMPTS)  # the prompts matter


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_equals_transformers(tied: bool) -> None:
    model = make_model(seed=1, tie_word_embeddings=tied)
    llama = as_transformers(model)
    suppressed = forbidden_tokens(TOKENIZER, model.config.vocab_size).nonzero()[:, 0].tolist()
    for prompt, answer in zip(PROMPTS, generate(model, TOKENIZER, PROMPTS, GREEDY), strict=True):
        theirs = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=min(16, 128 - len(prompt)),
            eos_token_id=TOKENIZER.stop_id,
            pad_token_id=TOKENIZER.pad_id,
            suppress_tokens=suppressed,
        )
        assert theirs[0, len(prompt) :].tolist() == answer.ids


def test_logits_of_prefill_decode_and_continuation_equal_the_whole_pass() -> None:
    """Rows of different lengths, freed and filled again in another order, in pieces and token by token."""
    model = make_model(seed=2, dtype=torch.float64)  # float32 differs by 1.3e-5 in one logit of 100,352 on some CPUs
    texts = [torch.randint(0, 1000, (length,)).tolist() for length in (9, 30, 17)]
    whole = [model(torch.tensor([ids]), torch.arange(len(ids))[None])[0] for ids in texts]
    cache = KVCache(model.config, 4, 40, model.embedding.weight)

    def run(rows: list[int], pieces: list[list[int]], decode: bool = False) -> torch.Tensor:
        positions = cache.extend(rows, [len(piece) for piece in pieces], decode)
        ids = torch.tensor([token for piece in pieces for token in piece]).view(positions.shape)
        return model(ids, positions, cache=cache)[:, 0]

    def check(logits_RV: torch.Tensor, which: list[int], lengths: list[int]) -> None:
        expected = torch.stack([whole[text][length - 1] for text, length in zip(which, lengths, strict=True)])
        torch.testing.assert_close(logits_RV, expected, rtol=1e-5, atol=1e-5)

    check(run([0, 2], [texts[0][:4], texts[1][:20]]), [0, 1], [4, 20])  # empty rows
    check(run([0, 2], [texts[0][4:5], texts[1][20:21]], decode=True), [0, 1], [5, 21])  # different lengths
    check(run([2], [texts[1][21:22]], decode=True), [1], [22])
    check(run([3, 0], [texts[2][:6], texts[0][5:8]]), [2, 0], [6, 8])  # one empty, one continued
    cache.free(2)
    check(run([2], [texts[2][:6]]), [2], [6])
    check(run([2, 3], [texts[2][6:7]] * 2, decode=True), [2, 2], [7, 7])  # equal lengths
    cache.free(3, keep=5)
    check(run([3, 2], [texts[2][5:9], texts[2][7:10]]), [2, 2], [9, 10])


def test_an_answer_ends_at_the_stop_token_the_length_or_the_window() -> None:
    model = make_model()
    ends_with = recomputed(model, PROMPTS[0], 24)[4]
    stopping = Tokenizer.load()
    stopping.stop_ids = frozenset([ends_with])  # the token this model says fifth
    answer = generate(model, stopping, PROMPTS[:1], GREEDY)[0]
    assert answer.finish == "stop"
    assert ends_with not in answer.ids
    assert len(answer.ids) <= 4
    assert generate(model, TOKENIZER, PROMPTS[:1], GREEDY)[0].finish == "length"
    long = generate(model, TOKENIZER, [PROMPTS[0], PROMPTS[2]], Sampling(temperature=0, max_length=2048))
    for prompt, filled in zip((PROMPTS[0], PROMPTS[2]), long, strict=True):
        assert filled.finish == "window"
        assert len(prompt) + len(filled.ids) == 128


@pytest.mark.parametrize("length", [0, 128, 500])
def test_a_prompt_that_leaves_no_room_is_refused(length: int) -> None:
    with pytest.raises(UserError, match=f"{length} tokens, and the model's context length is 128"):
        generate(make_model(), TOKENIZER, [PROMPTS[0], [5] * length], GREEDY)


def test_special_tokens_that_answers_do_not_have_are_never_sampled() -> None:
    """A model that wants nothing but special tokens and padding ids still says text, parts of an answer, or stops."""
    model = make_model()
    model.embedding.weight[100_257:] = 0
    model.norm.weight.zero_()  # all logits equal: untied output rows decide nothing
    ids = [
        i
        for answer in generate(model, TOKENIZER, PROMPTS * 8, Sampling(2.0, None, 1.0, 60, seed=1))
        for i in answer.ids
    ]
    assert len(ids) > 1000
    said = {"<|im_end|>", "<|reasoning|>", "<|reasoning_end|>", "<|tool_call|>", "<|tool_call_end|>"}
    special = {token for token in {*ids} if token >= 100_257}
    assert {TOKENIZER.decode([token]) for token in special} <= said
    allowed = (~forbidden_tokens(TOKENIZER, 100_352)).nonzero().flatten().tolist()
    assert {TOKENIZER.decode([token]) for token in allowed if token >= 100_257} == said
    assert len(allowed) == 100_257 + len(said)


def test_seeds_reproduce_and_do_not_depend_on_the_batch() -> None:
    model = make_model(seed=3)
    sampling = Sampling(temperature=1.0, max_length=20, seed=7)
    first = [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, sampling)]
    again = [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, sampling)]
    other = [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, Sampling(1.0, max_length=20, seed=8))]
    assert first == again
    assert first != other
    assert generate(model, TOKENIZER, PROMPTS[:1], sampling)[0].ids == first[0]
    drawn = {Sampling().seed for _ in range(8)}
    assert len(drawn) == 8


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4, "hidden_size": 40, "intermediate_size": 90}]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_bfloat16_is_as_near_to_float32_as_a_whole_pass_in_bfloat16(
    changes: dict[str, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding differs between one token and many, so logits are compared, not the choice between near-equals."""
    if not compiled:
        monkeypatch.setenv("LUMINA_CPU_KERNELS", "0")
        monkeypatch.setattr(cpu, "lib", lambda: None)
    elif cpu.lib() is None:
        pytest.skip("no C compiler: there is no compiled decoding step to test")
    exact, model = make_model(seed=4, **changes), make_model(seed=4, dtype=torch.bfloat16, **changes)
    texts = [torch.randint(0, 1000, (length,)).tolist() for length in (12, 30, 21)]
    whole = [[m(torch.tensor([t]), torch.arange(len(t))[None])[0].float() for t in texts] for m in (exact, model)]
    cache, rows = KVCache(model.config, 4, 40, model.embedding.weight), [3, 0, 2]
    decoder = Decoder(model, cache, torch.zeros(model.config.vocab_size, dtype=torch.bool))

    def step(pieces: list[int], where: list[int]) -> torch.Tensor:
        kept_RV, ids_RV = decoder.step(torch.tensor(pieces)[:, None], where, None)
        return torch.empty_like(kept_RV).scatter_(1, ids_RV, kept_RV).float()

    assert decoder.compiled == compiled
    model(torch.tensor([[token for text in texts for token in text[:6]]]), cache.extend(rows, [6] * 3), cache=cache)
    for at in range(6, 12):
        logits_RV = step([t[at] for t in texts], rows)
        for row, reference, rounded in zip(logits_RV, *whole, strict=True):
            assert (row - reference[at]).norm() <= 2 * (rounded[at] - reference[at]).norm()
    alone = step([texts[1][12]], rows[1:2])[0]
    assert (alone - whole[0][1][12]).norm() <= 2 * (whole[1][1][12] - whole[0][1][12]).norm()


@pytest.mark.parametrize("std", [0.02, 3.0])
@pytest.mark.parametrize("k", [1, 2, 50, 100])
def test_the_shortlist_is_exactly_the_largest_logits(k: int, std: float) -> None:
    """Against the whole product in float64, with rows of very different sizes, duplicates and a row of zeros."""
    if cpu.lib() is None:
        pytest.skip("no C compiler: there is no shortlist to test")
    torch.manual_seed(k)
    weight_VD = std * torch.randn(3000, 48) * torch.rand(3000, 1) ** 3
    weight_VD[10:20], weight_VD[5] = weight_VD[20:30], 0
    weight_VD = weight_VD.bfloat16()
    shortlist = Shortlist(weight_VD)
    forbidden_V = torch.rand(3000) < 0.1
    for scale in (1e-3, 1.0, 50.0):
        x_RD = scale * torch.randn(2, 48)
        exact_RV = (x_RD.double() @ weight_VD.double().T).masked_fill(forbidden_V, -torch.inf)
        kept_Rk, ids_Rk = shortlist.top(x_RD, k, forbidden_V)
        torch.testing.assert_close(kept_Rk.double(), exact_RV.topk(k).values, rtol=1e-4, atol=1e-6 * scale * std)
        torch.testing.assert_close(exact_RV.gather(1, ids_Rk), kept_Rk.double(), rtol=1e-4, atol=1e-6 * scale * std)
        assert all(len(set(row)) == k for row in ids_Rk.tolist())


def test_the_shortlist_and_all_logits_generate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(seed=9, dtype=torch.bfloat16)
    samplings = [Sampling(temperature=0, max_length=12), Sampling(1.0, 20, max_length=12, seed=1)]
    short = [generate(model, TOKENIZER, PROMPTS[:2], sampling) for sampling in samplings]
    monkeypatch.setattr("lumina.model.decode._MOST_SHORTLISTED", 0)
    assert [generate(model, TOKENIZER, PROMPTS[:2], sampling) for sampling in samplings] == short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_a_diverged_model_is_said_to_be_one(dtype: torch.dtype, after: bool) -> None:
    model = make_model(dtype=dtype)
    tokens = stream(model, TOKENIZER, PROMPTS[:1], GREEDY)
    if after:
        next(tokens)
    model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        next(tokens)


def test_text_streams_in_whole_characters() -> None:
    text = "naïve café — 日本語 🙂🙂 end"
    stream = TOKENIZER.incremental_decoder()
    pieces = [stream.push(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + stream.end() == text
    assert "\ufffd" not in "".join(pieces)
    cut = TOKENIZER.incremental_decoder()
    assert cut.push(TOKENIZER.encode("🙂")[0]) == ""
    assert cut.end() == "\ufffd"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_give_a_sequence_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """One row, two (a shortlist in bfloat16), five and eight: logits equal to the last bit."""
    if cpu.lib() is None:
        pytest.skip("no C compiler: there is no compiled decoding step to test")
    model = make_model(seed=5, dtype=dtype, vocab_size=515)
    forbidden_V = torch.zeros(515, dtype=torch.bool)
    prompts = [torch.randint(0, 515, (3 + 2 * row,)).tolist() for row in range(8)]
    said = torch.randint(0, 515, (8, 4))

    def logits(rows: list[int]) -> torch.Tensor:
        """Of the last of four steps: (R, 20), the largest in order."""
        cache = KVCache(model.config, 8, 40, model.embedding.weight)
        decoder = Decoder(model, cache, forbidden_V)
        assert decoder.compiled
        for row in rows:  # each on its own, as the server does it
            model(torch.tensor([prompts[row]]), cache.extend([row], [len(prompts[row])]), cache=cache)
        for step in range(4):
            kept_Rk, ids_Rk = decoder.step(said[rows, step : step + 1], rows, 20)
        return torch.cat([kept_Rk.float(), ids_Rk], 1)

    together = logits(list(range(8)))
    for rows in ([3], [6, 1], [7, 2, 4, 0, 5]):
        assert torch.equal(logits(rows), together[rows])
