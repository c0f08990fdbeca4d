"""Hold-out: which groups of conversations make up the evaluation set.

A group is held out when a hash of its first member, a number in [0, 1), lies below the share asked. Groups that are
large or few can miss that share by far: then the set is put together in the order of the hashes, from groups that bring
it nearer to the share, and what came of it is told. A share that no choice of groups comes near is refused: 10% cannot
be held out where two groups hold half of the conversations each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import Conversation


class HoldOut(NamedTuple):
    """What came of holding out `asked` of the conversations (duplicates that are removed not counted): `held` of
    `conversations`, in `groups` groups in all, of which the largest holds the conversations `largest_N`. `by_hash`: no
    choice had to be made. `refused`: `held` is the nearest to the share that there is, and it is far from it."""

    asked: float
    conversations: int
    held: int
    groups: int
    largest_N: NDArray[np.int64]
    by_hash: bool
    refused: bool

    def note(self) -> str:
        """What was held out, in words."""
        share = 100 * self.held / max(1, self.conversations)
        return (
            f"{self.held:,} of {self.conversations:,} conversations held out, {share:.3g}% where"
            f" {100 * self.asked:.3g}% was asked ({self.groups:,} groups)"
        )


def hold_out(
    root_N: NDArray[np.int64], hash_N: NDArray[np.uint64], stays_N: NDArray[np.bool_], asked: float
) -> tuple[NDArray[np.bool_], HoldOut]:
    """Which conversations are held out, bool[N], and what came of it.

    Args:
        root_N: each conversation's group, as the number of its first member.
        hash_N: 64 bits of each conversation; a group's are those of its first member.
        stays_N: false for duplicates, which are removed afterwards and count for nothing.
    """
    roots, group_N = np.unique(root_N, return_inverse=True)
    size_G = np.bincount(group_N, weights=stays_N, minlength=len(roots)).astype(np.int64)
    # A root is its group's first conversation; its own hash, not its place, chooses the side.
    salted = hash_N[roots] ^ np.uint64(0x9E3779B97F4A7C15)
    share_G = (salted * np.uint64(0xD1342543DE82EF95) >> np.uint64(11)).astype(np.float64) / 2.0**53
    total = int(size_G.sum())
    chosen_G = share_G < asked
    by_hash = _near(int(size_G[chosen_G].sum()), total, asked)
    if not by_hash:
        chosen_G = _nearest(size_G, share_G, asked * total)
    held = int(size_G[chosen_G].sum())
    largest = int(size_G.argmax()) if total else 0
    outcome = HoldOut(
        asked,
        total,
        held,
        len(roots),
        np.flatnonzero((group_N == largest) & stays_N),
        by_hash,
        refused=not 0 < held < total or held > max(2 * asked * total, 1),
    )
    return chosen_G[group_N], outcome


def _near(held: int, total: int, asked: float) -> bool:
    """Whether neither side is less than half of what was asked, or the evaluation more than twice."""
    target = asked * total
    return 0 < held < total and target / 2 <= held <= 2 * target and 2 * (total - held) >= total - target


def _nearest(size_G: NDArray[np.int64], share_G: NDArray[np.float64], target: float) -> NDArray[np.bool_]:
    """The groups, by their hashes, that each bring the evaluation nearer to `target` conversations; where none does,
    the smallest one. Never all of them."""
    chosen_G, held = np.zeros(len(size_G), dtype=np.bool_), 0
    order_G = np.argsort(share_G, kind="stable")
    for group in order_G.tolist():
        size = int(size_G[group])
        if abs(held + size - target) < abs(held - target):
            chosen_G[group], held = True, held + size
    if not held and len(size_G):
        chosen_G[order_G[size_G[order_G].argmin()]] = True
    elif chosen_G.all() and len(size_G) > 1:
        chosen_G[order_G[-1]] = False
    return chosen_G


def explain(
    outcome: HoldOut,
    group_N: NDArray[np.uint64],
    prompt_N: NDArray[np.uint64],
    conversation_at: Callable[[int], Conversation],
) -> tuple[str, str]:
    """(why the share asked could not be met by hashes, what to do about it), from the largest group.

    Args:
        group_N, prompt_N: the signatures of ids and prompts, 0 for none.
        conversation_at: the conversation of a number, to name what it shares with the others.
    """
    largest = outcome.largest_N
    share = f"{len(largest):,} of {outcome.conversations:,} conversations"
    without = "name evaluation files of your own (eval_data), or go without (eval_fraction 0)"
    if outcome.held and outcome.held < outcome.conversations and outcome.refused:
        without = f"ask for {outcome.held / outcome.conversations:.2g}, the nearest that they allow, {without}"
    if len(largest) < 2:
        return f"there are only {outcome.conversations:,} conversation(s)", f"Give it more, {without}."
    by_id, with_id = _most(group_N[largest])
    by_prompt, with_prompt = _most(prompt_N[largest])
    if 2 * max(by_id, by_prompt) < len(largest):
        why = f"{share} are linked by their ids, first prompts or near-duplicates and stay on one side"
        return why, f"{without[0].upper()}{without[1:]}."
    share += " stay on one side"
    if max(by_id, by_prompt) < len(largest):
        share += f", {max(by_id, by_prompt):,} of them"
    first = conversation_at(int(largest[with_id if by_id >= by_prompt else with_prompt]))
    if by_id >= by_prompt:
        why = f"{share} because they have one `id` (or `tree_id`): {first.id[:60]!r}"
        return why, f"If it names no conversation, leave that field out (jq -c 'del(.id)' IN > OUT). Or {without}."
    prompt = next(message.content for message in first.messages if message.role == "user")
    why = f"{share} because they begin with one prompt: {prompt[:60]!r}"
    return why, f"If it is an instruction and no question, make it the system message. Or {without}."


def _most(key_N: NDArray[np.uint64]) -> tuple[int, int]:
    """(how many have the most frequent key that is not 0, the index of the first of them); (0, 0) without any."""
    known = np.flatnonzero(key_N)
    if not len(known):
        return 0, 0
    _, first, counts = np.unique(key_N[known], return_index=True, return_counts=True)
    return int(counts.max()), int(known[first[counts.argmax()]])
