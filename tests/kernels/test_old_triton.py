"""A Triton that is too old is refused where it would break, with the remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

from lumina import kernels

ROOT = Path(__file__).parents[2]


def test_an_old_triton_is_refused_at_the_import(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text('__version__ = "3.3.1"\n')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lumina.kernels"
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lumina.kernels needs Triton 3.6 or newer, and 3.3.1 is installed: pip install")


def test_the_oldest_is_setups() -> None:
    oldest = ".".join(map(str, kernels.OLDEST_TRITON))
    assert re.search(rf'"triton>={re.escape(oldest)},<', (ROOT / "setup.py").read_text())
