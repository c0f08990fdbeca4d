"""docs/health.md's tables, from the rules and the configuration's schema: `python -m lumina.train.health.docs` prints
the page, and a test holds the file to it."""

from __future__ import annotations

from lumina.config import HEALTH_RULES, HealthConfig, SavingConfig
from lumina.terminal import say

_HEAD = """\
# Health of a run

<!-- Written by `python -m lumina.train.health.docs`; a test compares. -->

The console line ends in `Health: OK`, `WARN(reason)` or `CRIT(reason)`. Behind it, rules watch the steps, evaluations,
layers and the machine. A baseline is the median and the median absolute deviation over the last `health_window` steps;
the current value is never part of its own baseline, and a refused step never enters one. No loss and no gradient norm
below one and a half times the largest of its baseline is a spike: where most of the data is learned by heart and the
rest is not, both heights are ordinary. What a rule finds is one episode: logged once in `train.log`, with its beginning
and its end in `events.jsonl`, and shown in the console line until `health_check_interval` steps have passed without a
sign of it (or at once, where its cause is plainly gone).

`events.jsonl` in the run's folder has one JSON object per line: `step`, `time`, `kind` (`health`, `recovery`, `save`,
`run`), `level`, `rule`, `reason`, `action`, and where they apply `samples` and `values`.

## Rules

Switch one off with `disabled_rules: [NAME]`. Another installed package adds one by an entry point of the group
`lumina.health_rules`, a class derived from `lumina.train.health.Rule`; what `rule_settings: {NAME: {KEY: VALUE}}` gives
goes to its constructor.

| rule | raised when | settings |
|---|---|---|
"""

_RECOVERY = """
## Recovery

- **A step that is not finite or spikes** is skipped on all ranks together: its loss and its gradient norm are held to
  limits known before it, the same on every rank, by the device itself inside the update. The samples of the whole
  global batch go to `events.jsonl`. `on_spike: warn` only reports spikes.
- **Repeated ones** (`rollback_after` within `health_check_interval` steps) bring the run back to the latest valid
  checkpoint from before the first of them; those steps are then skipped. `max_rollbacks` bounds it, and then the run
  ends with a clear failure. The skipped steps are kept in `recovery.json`, so that a killed run comes to the same end
  (the `answers.json` of version 0.1.0 is taken over). Checkpoints made in between are discarded.
- **Before the first checkpoint** there is nothing to go back to. Where updates were refused one after another, the
  weights are beyond the limits and not the samples: baselines and limits are measured anew, and updates, clipped to
  `max_grad_norm`, are made again. `max_rollbacks` bounds this too. Where it or `rollback_after` is 0, the run never
  goes back, and ends only when `health_check_interval` updates in a row, and at least 30, were refused.
- **Out of memory** (`on_oom`): memory is freed, the engine rebuilt with half the micro-batch and twice
  the accumulation, and the step taken again: same global batch, same gradient. With several ranks that works when
  every rank runs out before a collective of that step has begun (never so under ZeRO-3, and not asked among more
  than 64 ranks); otherwise the run ends, and the next start takes the smaller micro-batch: by itself
  under `lumina launch`, else with `--resume auto`. A micro-batch of one sample that does not fit is a failure. What
  fitted is kept in `recovery.json` with what made the room: a start that has more of it (more ranks to a row or to
  divide the weights' state between, more recomputation, offloading or smaller tiles) takes the configured one again.
  What version 0.2.0 left there as `micro_batch_size` holds whatever the room, and the log says so: remove that key.
  Inside an update the same holds: the step is taken again where every rank runs out at the same place and has changed
  nothing yet, under every stage; otherwise the next start goes on from the last checkpoint.
- **A sample that cannot be read** (`on_corrupt_sample`) becomes one of weight zero and is counted; the step still
  divides by the token count that the index gives it.
- **An exception** (`emergency_checkpoint`) saves the step before it ends the run, if no update was interrupted, the
  weights are finite, the step is not saved already, and every rank says within ten seconds that it stands there
  too. A user's mistake is not an exception.
- **One rank alone** that ends by a user's mistake, by memory amid a collective or by a file that it cannot read leaves
  the reason in `ending.json`. Over gloo the ranks that lose it end by the same message and exit code: 2 for a user's
  mistake, else 1, which a restart answers. Over NCCL its own watchdog may end them first, or nothing before
  `hang_timeout` (exit code 77), where no launcher ends them with the lost one.
- **A rank that hangs** ends when `hang_timeout` seconds pass without progress, with every thread's stack. Progress is
  each micro-batch, update, evaluation batch and save, and within a step each layer that the device comes past, forward
  and backward: a step may take hours, as over rows of millions of tokens, if none of its layers takes `hang_timeout`.
  While that is watched, no collective ends by a timeout of its own, which NCCL counts from when it is queued; with
  `hang_timeout: 0` all process groups have DeepSpeed's (10 minutes, or `DEEPSPEED_TIMEOUT`, in minutes). The passes
  of DPO's reference model before the first step are watched in the same way.
- **A save that fails** is tried again after 5 seconds, doubled up to five times; not where that cannot help (a
  read-only disk, no permission). Training goes on. At the end of the run a last checkpoint that cannot be written is
  exit code 1.

## When a step's numbers are read

Reading a number from a GPU waits until everything queued before it is done, and the GPU then waits for the host. So
the host reads a step's loss, norm, flags and times **while the next step is computed**: when that one's forward and
backward passes are queued, and before its update. What they decide is decided there, with weights, moments and progress
still those of the step that they belong to:

- A step's record appears while the next step runs; the last one's, and one followed by an evaluation, a save or a
  comparison of ranks, at once. A failure or a stop completes them. A run that is killed outright has no record of its
  last step, and no checkpoint of it either.
- Baselines, limits and rollbacks are those of a run that reads each step at once, and so is the weights' every bit:
  step k is held to limits from the steps before it, k - 1 included, whether a save or a resume lies between or not.
- A stop by a signal, a resize or a rollback leaves the state of the same step; the passes of the one that had been
  begun are thrown away. From a signal to its save that is up to two steps of time. A
  stop cannot end a step earlier, since the ranks agree on it in the step's sum. `stop_timeout` does not count the whole
  of that, but seconds without progress: raise it where a layer takes longer. What started the ranks counts all of it:
  give `lumina launch --stop-timeout`, or Slurm's `--signal=USR1@SECONDS`, more than two steps and a save.
  `lumina checkpoints save` is honoured within two steps.
- Layer statistics read their step at once (`layer_stats_every`).

How often the host waits for the device in a steady step of two micro-batches (counted by
`pytest tests/train/test_host_waits.py`, in all of Lumina and DeepSpeed 0.19.8, without a GPU; before: version 0.1.0):

| ZeRO stage | 0 | 1 | 2 | 3 |
|---|---|---|---|---|
| bf16, before | 18 | 18 | 20 | 22 |
| fp32, before | 14 | 17 | 19 | 22 |
| now | 1 | 1 | 1 | 1 |

The one is for numbers of the step before. Two kinds of run need a decision on the host and wait once more, in the
update: fp16 under ZeRO 1 to 3, whose dynamic loss scale DeepSpeed keeps there, and an optimizer on the host
(`offload_optimizer`), which waits for its gradients anyway. Not counted: ZeRO-3 holds the host back when more than two
buckets of gradients, or two gathers, are under way, which bounds its memory and leaves the device work to do. And
with a second copy of the shards within a node (`zero_hpz_partition_size` above 1) DeepSpeed waits for the stream once
a step for every weight, when it is divided again after its first gather.

## Saving and backups

With `save_async` a save copies the state and a thread of lower priority writes it: streamed, hashed, flushed, named
last. While it writes, the next save waits its turn; the best evaluation's, a signal's and the last one wait for it. The
stall is in `events.jsonl` (`values.stall`, seconds). The snapshot takes 12 bytes of host memory per parameter over all
ranks, kept for the whole run.

Before the first step a start sees whether checkpoints and backups can be written. Where checkpoints cannot, it is
refused. Where backups cannot, a run that begins is refused if no later try could do better (a read-only disk, no
permission, a file in the way); if it may pass (a disk that is away or full), and for a run that began before, a warning
says so, on whichever machine it is, each backup that is due is tried, and a failure is `backup-failed`. A `backup_dir`
on the file system of the run's folder, as of a disk that is not mounted at the moment, is a warning too.

`lumina checkpoints list|verify|prune|restore|save RUN` works on a run's checkpoints and backups; `save` asks the job
that trains it, on whatever node, through a file in `RUN/requests`, honoured within two steps.

## Settings

| setting | default | |
|---|---|---|
"""


def _comments() -> dict[str, str]:
    """What the schema says behind each setting."""
    import inspect
    import sys

    from lumina.config import HealthConfig

    found, pending = {}, ""
    for line in inspect.getsource(sys.modules[HealthConfig.__module__]).splitlines():
        text = line.strip()
        if text.startswith("# "):
            pending = f"{pending} {text[2:]}".strip()
            continue
        code, _, comment = text.partition("  # ")
        name, colon, _ = code.partition(":")
        if colon and name.isidentifier():
            found[name] = comment or pending
        pending = ""
    return found


def page() -> str:
    """The whole of docs/health.md."""
    lines = []
    for name in HEALTH_RULES.own():
        rule, summary = HEALTH_RULES.get(name), HEALTH_RULES.summary(name).removesuffix(".")
        when = summary[:1].lower() + summary[1:]
        critical = " (CRIT)" if rule.level == "crit" else ""
        lines.append(f"| `{name}` | {when}{critical} | {', '.join(f'`{key}`' for key in rule.settings)} |")
    comments = _comments()
    rows = []
    for group in (HealthConfig, SavingConfig):
        for name, field in group.model_fields.items():
            rows.append(f"| `{name}` | `{field.default!r}` | {comments[name]} |")
    return _HEAD + "\n".join(lines) + "\n" + _RECOVERY + "\n".join(rows) + "\n"


if __name__ == "__main__":
    say(page(), end="")
