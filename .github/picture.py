"""Draw .github/optimize.svg: the README's first command and what it prints.

python .github/picture.py
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command in an empty folder and draw its output; the picture needs no network."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"&& (graphopt optimize .*)", readme)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(ROOT / "models")
        words = [sys.executable, "-m", *found[1].split()]
        shown = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout
    console = Console(record=True, file=io.StringIO(), width=112)
    console.print(Text(f"$ {found[1]}", style="bold"), soft_wrap=True)
    console.print(Text(shown.rstrip()))
    svg = console.export_svg(title="graphopt")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    (ROOT / ".github" / "optimize.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
