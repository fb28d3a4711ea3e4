"""Run mypy on the package under its own name, whatever the checkout's folder is called.

The checkout is the package, so mypy would name it after the folder, which need not be an identifier.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hub", "index", "merge", "generate", "cli")


def main() -> int:
    """mypy's exit status."""
    package = ROOT / ".mypy_cache" / "tree" / "lorahub"
    package.parent.mkdir(parents=True, exist_ok=True)
    package.unlink(missing_ok=True)
    package.symlink_to(ROOT)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml"]
    return subprocess.run([*command, *(str(package / name) for name in FOLDERS)], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
