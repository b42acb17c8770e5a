"""The house rules that a machine can hold: floors, layout, budgets, public API, wheel."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import graphopt

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "uv.lock"),
    *("graphopt", "passes", "backends", "models", "tests"),
}
PACKAGES = ("passes", "backends", "models")
INNER = ("cli", "files", "pruner", "quantizer", "shapes")
LINES, FUNCTION_LINES = 450, 80

# A file imports only from its own floor and those below; `x*` is every module that starts so.
FLOORS = [
    "errors collector ir dims _polynomial files atomic npz plots places digests wildcards "
    "supervision __version__",
    "shapes cost sizes runner emulation batch execute numpy_ops numpy_moves feeds input_uses "
    "random_inputs target report closeness artifact child trust cache models samples "
    "taps gram lowrank wide_sums",
    "context _match rewriting driver pass_manager numbering cutting regions judging verification "
    "losses profiles partition bodies splicing rebatching attachments quantizer pruner",
    "passes",
    "backends timing accuracy chain flow",
    "optimization _ways quantization pruning resolution rounds compression surgery explanation "
    "compilation building pieces selection worker rpc machine measurement bisection differences "
    "inspection _foreign graphsurgeon onnxscript cli __init__ __main__",
]
PUBLIC = {
    *("GraphoptError", "Model", "PassManager", "Refuse", "Report", "Target"),
    *("compile", "compress", "load", "measure", "optimize", "prune", "quantize", "rewrite"),
    *("save", "verify"),
}


def tracked() -> list[Path]:
    """The files of the project, relative to its root; skips where this is no git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    files = (Path(name) for name in listed.stdout.split("\0") if name)
    return [file for file in files if (ROOT / file).is_symlink() or (ROOT / file).is_file()]


def modules() -> Iterator[tuple[str, Path]]:
    """Each module that is shipped: its name below graphopt, its file."""
    for file in sorted(ROOT.glob("graphopt/*.py")):
        yield file.stem, file
    inner = (ROOT / "graphopt" / name for name in INNER)
    for folder in (*inner, *(ROOT / name for name in PACKAGES)):
        for file in sorted(folder.rglob("*.py")):
            yield f"{folder.name}.{file.stem}", file


MODULES = list(modules())


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def floor(name: str) -> int | None:
    """The floor that a module or package of graphopt is on; None where it has none."""
    for number, patterns in enumerate(FLOORS):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
            return number
    return None


def reached(dotted: str) -> int:
    """The floor of what is imported; 0 for what is not graphopt's, the top for the facade."""
    first, _, rest = dotted.partition(".")
    if first != "graphopt":
        return 0
    number = floor(rest.partition(".")[0])
    return len(FLOORS) - 1 if number is None else number


@pytest.mark.parametrize(("name", "file"), MODULES, ids=[name for name, _ in MODULES])
def test_module(name: str, file: Path) -> None:
    """One module: its floor, its length, its docstrings."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    own = name.partition(".")[0]
    number = floor(own)
    assert number is not None, f"give {own!r} a floor in {Path(__file__).name}"
    for line, dotted in imports(tree):
        assert reached(dotted) <= number, f"{file.name}:{line}: {dotted} is on a higher floor"
        assert dotted.partition(".")[0] != "onnx_ir" or name == "ir", f"{file.name}:{line}: use ir"

    assert len(text.splitlines()) <= LINES
    assert ast.get_docstring(tree), f"{file.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :] or node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1
            assert length <= FUNCTION_LINES, f"{file.name}: {node.name} has {length} lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"


def test_top_level() -> None:
    """Nothing stands at the top but what the layout has."""
    entries = {file.parts[0] for file in tracked() if not file.parts[0].startswith(".")}
    assert entries <= ALLOWED, entries - ALLOWED


def test_links() -> None:
    """The three packages are found below graphopt in a clone that nothing was installed from."""
    for name in PACKAGES:
        link = ROOT / "graphopt" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
        assert importlib.import_module(f"graphopt.{name}").__name__ == f"graphopt.{name}"


PASSES = sorted(f for f in (ROOT / "passes").glob("*.py") if not f.name.startswith("_"))


@pytest.mark.parametrize("file", PASSES, ids=[file.stem for file in PASSES])
def test_pass(file: Path) -> None:
    """A pass has a fixture and says why it is there, what it does to numbers, what it needs."""
    assert (ROOT / "tests" / "passes" / f"{file.stem}.onnxtxt").is_file(), "no fixture"
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert doc.partition("\n")[0].endswith(".")
    assert re.search(r"\bWhy: \S", doc)
    assert re.search(r"\bNumerics: (exact|rounding|lossy)\b", doc)
    assert re.search(r"\bNeeds: \S", doc)


def test_fixtures() -> None:
    """Every fixture belongs to a pass."""
    fixtures = {file.stem for file in (ROOT / "tests" / "passes").iterdir()}
    assert fixtures <= {file.stem for file in PASSES}


def test_public_api() -> None:
    """The public names are these, each resolves, and each is documented."""
    assert set(graphopt.__all__) == PUBLIC
    for name in graphopt.__all__:
        assert name == "Model" or getattr(graphopt, name).__doc__  # Model is onnx-ir's
    assert graphopt.__version__ == version("graphopt")
    with pytest.raises(AttributeError, match="nothing"):
        _ = graphopt.nothing


def test_import_is_cheap() -> None:
    """`import graphopt` loads none of what it stands on; the passes never load sympy."""
    script = (
        "import sys, graphopt\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from graphopt import models\n"
        "graphopt.optimize(models.path('digits_cnn'), verify='off')\n"
        "assert 'sympy.core' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)


def test_nothing_private_is_named() -> None:
    """No file names folders of the machine that it was written on."""
    foreign = re.compile(r"\.\./" "shared|/work/" "main|/tmp/" r"(?:venv|peers|w)\b")
    for file in tracked():
        if (ROOT / file).is_file() and file.suffix not in (".onnx", ".npz"):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not foreign.search(text), file


def test_wheel(tmp_path: Path) -> None:
    """The wheel holds graphopt and nothing beside it, with the models and the type marker."""
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77")
    tree = tmp_path / "tree"
    for file in tracked():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tree / file, follow_symlinks=False)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=tree, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(file) for file in tracked() if file.suffix == ".py" and file.parts[0] == "graphopt"
    }
    for file in tracked():
        if file.parts[0] in PACKAGES and file.suffix in (".py", ".onnx", ".npz"):
            expected.add(f"graphopt/{file}")
    assert held == expected | {"graphopt/py.typed"}
