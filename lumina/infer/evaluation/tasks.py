"""`lumina evaluate --tasks`: the benchmarks of lm-evaluation-harness, asked of a model through its own tokenizer.

The harness hands over texts, and wants to know how likely one is to follow another, or what the model says
(lm_eval.api.model.LM, version 0.4). Requests are scored in windows that attend to themselves alone, so the answers do
not depend on how many are taken at a time. A context that leaves no room in the context length loses its beginning, as
everywhere in the harness; how often is said.

With `chat`, questions go through the model's own template. The harness carries prompts as text, where a special token
would be just its name, and text never becomes a special token here. So a templated prompt is handed to the harness as a
key, which nothing in a data set can forge, and comes back to be looked up.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from lumina.chat import ROLE_ALIASES, Conversation, Message
from lumina.config import UserError
from lumina.infer.evaluation.loss import ScoringWindow, predict
from lumina.infer.generation.generate import generate
from lumina.infer.generation.sampling import LENGTHS, Sampling
from lumina.infer.loading import Loaded

log = logging.getLogger("lumina")

_LENGTH = 256  # of an answer when a task does not say; the harness's own default


def run_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 16,
    chat: bool = False,
) -> dict[str, Any]:
    """Results as the harness gives them: `results` by task, `versions`, `n-shot`, `n-samples` and so on.

    tasks: names that the harness knows, or paths of task files (.yaml); `folder` holds more of them.

    Raises:
        UserError: an unknown task, a task's data that cannot be had, an option that the model does not take.
    """
    named = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in tasks]
    for task in named:
        if task.endswith(".yaml") and not Path(task).is_file():
            raise UserError(f"no such file: {task}")
    names = [task for task in named if not task.endswith(".yaml")]
    manager = TaskManager(include_path=folder, include_defaults=False)
    if any(not manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)  # which reads some ten thousand files
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}",
            "`lm-eval ls tasks` lists them; --task-path DIR adds a folder of task files.",
        )
    model = LuminaLM(loaded, batch_size)
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(named),
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tasks cannot be run: {type(error).__name__}: {error}") from error
    if model.cut:
        log.warning(
            "%d contexts were longer than the context (%d tokens): begun later", model.cut, model.context_length
        )
    kept: dict[str, Any] = {key: value for key, value in dict(found or {}).items() if key in _KEPT}
    return kept


_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


def task_table(results: dict[str, Any]) -> str:
    """For a reader."""
    return str(make_table(results))


class LuminaLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The harness's model interface over a Lumina model."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        super().__init__()
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self.context_length = loaded.config.seq_length
        self._at_once = batch_size
        self._opening = self._tokenizer.text_ids("")  # what begins every text
        self._key, self._prompts = f"\ue000{secrets.token_hex(8)}:", list[list[int]]()
        self.cut = 0  # contexts that lost their beginning

    # --- Text and tokens ---

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.begin_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if string.startswith(self._key):
            number, text = re.match(r"(\d+)\ue001(.*)", string[len(self._key) :], re.DOTALL).groups()  # type: ignore[union-attr]
            return [*self._prompts[int(number)], *self._text(text)]
        return self._text(string) if add_special_tokens is False else [*self._opening, *self._text(string)]

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.text_ids(text)[len(self._opening) :] if text else []

    @property
    def tokenizer_name(self) -> str:
        return "lumina"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "the model's own" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(ROLE_ALIASES.get(turn["role"], turn["role"]), turn["content"]) for turn in chat_history]
        begun = "" if add_generation_prompt else messages.pop().content  # an answer to go on with
        self._prompts.append(self._tokenizer.prompt_ids(Conversation(messages)))
        return f"{self._key}{len(self._prompts) - 1}\ue001{begun}"

    # --- What the harness asks ---

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _texts, context, continuation in requests:
            ids = [*context, *continuation]
            kept = ids[-self.context_length - 1 :]
            self.cut += len(kept) < len(ids)
            windows.append(ScoringWindow(kept, max(len(kept) - len(continuation), 1)))
        found = predict(self._model, windows, self._at_once)
        return [
            (-float(nats.double().sum()), bool(likeliest.all()))
            for nats, likeliest in tqdm(found, "scored", len(windows), disable=disable_tqdm)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(self._text(request.args[0]), self.eot_token_id, self.context_length, 1)
            for context, predicted in map(make_disjoint_window, pairs):
                windows.append(ScoringWindow([*context, *predicted], len(context)))
                owners.append(number)
        sums = [0.0] * len(requests)
        found = predict(self._model, windows, self._at_once)
        for number, (nats, _) in zip(owners, tqdm(found, "scored", len(windows), disable=disable_tqdm), strict=True):
            sums[number] -= float(nats.double().sum())
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        grouped: dict[Sampling, list[int]] = defaultdict(list)
        prompts = []
        for number, request in enumerate(requests):
            context, wanted = request.args
            sampling = _sampling(wanted, number)
            room = max(self.context_length - sampling.max_length, self.context_length // 2)
            ids = self.tok_encode(context)
            self.cut += len(ids) > room
            prompts.append(ids[-room:])
            grouped[sampling].append(number)
        said = [""] * len(requests)
        with tqdm(total=len(requests), desc="answered", disable=disable_tqdm) as bar:
            for sampling, numbers in grouped.items():
                for start in range(0, len(numbers), self._at_once):
                    chosen = numbers[start : start + self._at_once]
                    answers = generate(self._model, self._tokenizer, [prompts[n] for n in chosen], sampling)
                    for number, answer in zip(chosen, answers, strict=True):
                        said[number] = answer.text
                    bar.update(len(chosen))
        return said


def _sampling(wanted: dict[str, Any], number: int) -> Sampling:
    """The harness's generation arguments as ours: greedy unless they say `do_sample`, and then with random numbers of
    request `number`'s own. Raises UserError for values out of range."""
    until = wanted.get("until") or []
    length = int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or _LENGTH)
    stops = tuple(dict.fromkeys(text for text in ([until] if isinstance(until, str) else until) if text))
    sampling = Sampling(temperature=0.0, top_k=None, top_p=1.0, max_length=min(length, LENGTHS[1]), seed=0, stop=stops)
    if not wanted.get("do_sample"):
        return sampling
    temperature, top_p = float(wanted.get("temperature", 1.0)), float(wanted.get("top_p", 1.0))
    seed = int(wanted.get("seed", 0)) + number
    return replace(sampling, temperature=temperature, top_k=wanted.get("top_k"), top_p=top_p, seed=seed)
