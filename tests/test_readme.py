"""Every shell and Python block of the README, run in order in an empty folder.

The folder has links to what the README's reader stands in, a checkout. Installing and testing are
left out here: the environment is there already, and this is the test run. `.ci/run` does both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 300  # seconds a block may take
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LEFT_OUT = re.compile(r"^(git clone|cd|python -m venv|source|pip install|python -m pytest)\b.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the README that it starts on."""

    language: str
    text: str
    line: int

    @property
    def command(self) -> list[str]:
        """What runs it."""
        if self.language == "python":
            return [sys.executable, "-c", self.text]
        lines = [
            " && ".join(part for part in line.split(" && ") if not _LEFT_OUT.match(part)) or "true"
            for line in self.text.splitlines()
        ]
        return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def blocks(text: str) -> list[Block]:
    """The blocks of a README that are run, in order."""
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in _BLOCK.finditer(text)
    ]


BLOCKS = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all blocks: later ones use what earlier ones wrote."""
    path = tmp_path_factory.mktemp("readme")
    (path / "models").symlink_to(ROOT / "models")
    return path


@pytest.mark.parametrize("block", BLOCKS, ids=[f"line {block.line}" for block in BLOCKS])
def test_block(block: Block, folder: Path) -> None:
    """A block ends with exit code 0."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        block.command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def test_links() -> None:
    """Every relative link and picture of the README leads somewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [*re.findall(r"\]\(([^)#\s]+)", text), *re.findall(r'src="([^"]+)"', text)]
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target
