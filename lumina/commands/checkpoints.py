"""`lumina checkpoints`: list, verify, prune and restore a run's checkpoints, and ask a running job for one. Loads no
torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from lumina.commands.common import Arguments, Command, Parser
from lumina.terminal import say


def checkpoints(arguments: Arguments) -> int:
    """List, verify, prune or restore a run's checkpoints and backups, or ask a running job for one."""
    run = _run_folder(arguments.run)
    if arguments.action == "list":
        return _list(run)
    if arguments.action == "verify":
        return _verify(run)
    if arguments.action == "prune":
        return _prune(run, arguments.keep_last, arguments.keep_every, arguments.backups, arguments.dry_run)
    if arguments.action == "restore":
        return _restore(run, arguments.step, arguments.source)
    return _save(run, arguments.timeout)


def checkpoints_options(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    texts = {
        "list": "show every checkpoint and backup",
        "verify": "read every file against its hash; exit code 1 when one is damaged",
        "prune": "remove old ones; the best one stays",
        "restore": "copy a backup back among the checkpoints",
        "save": "ask the job that trains the run for a checkpoint now, and wait for it",
    }
    each = {}
    for name, text in texts.items():
        each[name] = actions.add_parser(name, help=text, description=text)
        each[name].add_argument("run", metavar="RUN", help="the run's folder, or its name under experiments/")
    each["prune"].add_argument("--keep-last", type=int, required=True, metavar="N", help="newest ones to keep")
    each["prune"].add_argument("--keep-every", type=int, metavar="K", help="also keep steps that are multiples of K")
    each["prune"].add_argument("--backups", action="store_true", help="the backups instead of the checkpoints")
    each["prune"].add_argument("--dry-run", action="store_true", help="only say what would go")
    each["restore"].add_argument("--step", type=int, metavar="N", help="that backup, not the newest whole one")
    each["restore"].add_argument("--from", dest="source", metavar="DIR", help="folder of backups (from config.yaml)")
    each["save"].add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait (600)")


def _run_folder(given: str) -> Path:
    """The run that a user means: its folder, or its name under experiments/."""
    from lumina.checkpoint import run_path
    from lumina.config import UserError

    folder = run_path(given)
    if (folder / "checkpoints").is_dir():
        return folder
    raise UserError(f"{given} is no run: it has no checkpoints folder", "Give a run's folder (experiments/NAME).")


def _folders(run: Path) -> dict[str, Path]:
    """Where a run's checkpoints are, and its backups where it has any."""
    from lumina import checkpoint

    backups = checkpoint.backup_folder(run)
    return {"checkpoint": run / "checkpoints"} | ({"backup": backups} if backups is not None else {})


def _found(run: Path) -> list[tuple[str, Path]]:
    from lumina import checkpoint

    return [(kind, path) for kind, folder in _folders(run).items() for path in checkpoint.list_checkpoints(folder)]


def _list(run: Path) -> int:
    """Print every checkpoint and backup of a run, newest first."""
    from lumina import checkpoint

    found = _found(run)
    if not found:
        say(f"{run} has no checkpoints yet")
        return 0
    say(f"{'step':>10}  {'place':<10}  {'size':>10}  {'written':<16}  notes")
    for kind, path in found:
        size = sum(file.stat().st_size for file in path.iterdir())
        written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        step = checkpoint.step_of(path)
        say(f"{step:>10}  {kind:<10}  {size / 2**20:>7.1f} MB  {written:<16}  {', '.join(_notes(path, step))}")
    return 0


def _notes(path: Path, step: int) -> list[str]:
    from lumina import checkpoint

    notes = ["best"] if checkpoint.best_step(path.parent) == step else []
    try:
        state, trainer = checkpoint.read_trainer_state(path)
    except (OSError, ValueError, TypeError):
        return [*notes, "trainer.json cannot be read"]
    if state.best_loss is not None and state.best_step == step:
        notes.append(f"eval loss {state.best_loss:.4f}")
    notes.append(f"ZeRO-{state.zero_stage}, {state.world} process(es)")
    if "emergency" in trainer:
        notes.append(f"emergency: {trainer['emergency']}")
    return notes


def _verify(run: Path) -> int:
    """Read every file of every checkpoint and backup against its hash; 1 when one is damaged."""
    from lumina import checkpoint

    damaged = 0
    for kind, path in _found(run):
        wrong = checkpoint.integrity_error(path)
        damaged += wrong is not None
        say(f"{kind} {path.name}: {'DAMAGED: ' + wrong if wrong is not None else 'whole'}")
    return 1 if damaged else 0


def _prune(run: Path, last: int, every: int | None, backups: bool, dry_run: bool) -> int:
    """Remove all but the newest `last` checkpoints (or backups), the best one, and every `every`th step."""
    from lumina import checkpoint
    from lumina.config import UserError

    if last < 1:
        raise UserError(f"--keep-last {last} would remove every checkpoint", "Keep at least one.")
    folder = _folders(run).get("backup" if backups else "checkpoint")
    if folder is None:
        raise UserError(f"{run} has no backup_dir", "Its config.yaml says where backups go.")
    keep = checkpoint.Retention(last, every)
    found = checkpoint.list_checkpoints(folder)
    kept = keep.kept([checkpoint.step_of(path) for path in found], checkpoint.best_step(folder))
    removed = [path for path in found if checkpoint.step_of(path) not in kept]
    if removed and all(checkpoint.integrity_error(path) is not None for path in found if path not in removed):
        raise UserError("none of the checkpoints that would stay is whole", f"See lumina checkpoints verify {run}.")
    for path in removed:
        say(f"{'would remove' if dry_run else 'removed'} {path}")
    if not dry_run:
        checkpoint.prune(folder, keep)
    say(f"{len(found) - len(removed)} kept")
    return 0


def _restore(run: Path, step: int | None, source: str | None) -> int:
    """Copy a backup (the newest whole one, or that of `step`) back among the run's checkpoints."""
    from lumina import checkpoint
    from lumina.config import UserError

    folder = Path(source) if source is not None else checkpoint.backup_folder(run)
    if folder is None:
        raise UserError(f"{run}/config.yaml names no backup_dir", "Give the folder with --from.")
    choices = [path for path in checkpoint.list_checkpoints(folder) if step in (None, checkpoint.step_of(path))]
    chosen = checkpoint.latest_valid(choices)
    if chosen is None:
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"no whole backup{wanted} in {folder}", f"lumina checkpoints list {run} shows what there is.")
    final = run / "checkpoints" / chosen.name
    if final.is_dir() and checkpoint.integrity_error(final) is None:
        say(f"{final} is there and whole: nothing to restore")
        return 0
    checkpoint.copy_checkpoint(chosen, final.parent)
    say(f"restored {final} from {chosen}")
    newest = checkpoint.list_checkpoints(final.parent)[0]
    if newest != final:
        say(f"--resume auto would take the newer {newest.name}; to go on from this one: --resume {final}")
    return 0


def _save(run: Path, timeout: float) -> int:
    """Ask the job that is training this run, wherever it runs, for a checkpoint now, and wait for the reply."""
    from lumina import checkpoint

    reply = checkpoint.request_save(run, timeout)
    if reply["error"]:
        say(f"step {reply['step']} could not be saved: {reply['error']}")
        return 1
    say(f"saved {reply['path']}")
    return 0


COMMANDS: dict[str, Command] = {"checkpoints": Command(checkpoints, checkpoints_options)}
