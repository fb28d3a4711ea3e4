"""Run mypy on the package under its own name, whatever the checkout's folder is called.

The checkout is the package, so mypy would name it after the folder, which need not be an identifier.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hub", "index", "merge", "generate", "cli")


def main() -> int:
    """mypy's exit status."""
    with tempfile.TemporaryDirectory() as room:
        package = Path(room) / "lorahub"
        package.symlink_to(ROOT)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.run([*command, *cache, *(str(package / name) for name in FOLDERS)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
