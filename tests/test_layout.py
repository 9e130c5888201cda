"""The form of the code, read with ast and tokenize: which file imports which, how dense the lines
are, how long the functions. And that the scripts run from any working directory."""

import ast
import io
import subprocess
import sys
import tokenize
from functools import cached_property

import pytest

from conftest import ROOT

SCRIPTS = {"advantage", "evaluate", "model", "rollout", "train"}
OURS = SCRIPTS | {"lab", "plumbing", "tasks"}
# Imports run one way: what each may import of ours, besides itself.
MAY_IMPORT = {
    "lab": OURS,
    "train": {"advantage", "evaluate", "model", "plumbing", "rollout", "tasks"},
    "evaluate": {"model", "plumbing", "rollout", "tasks"},
    "rollout": {"model", "plumbing"},
    "model": {"plumbing"},
    "plumbing": set(),
    "tasks": set(),
    "advantage": set(),
}
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Source:
    """A file of the repository, and what is counted in it."""

    def __init__(self, path):
        self.path = path
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    @property
    def documented(self):
        """The module, classes and functions that have a docstring."""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        return [node for node in nodes if ast.get_docstring(node) is not None]

    @cached_property
    def tokens(self):
        """All but comments and docstrings."""
        docstring_lines = set()
        for node in self.documented:
            docstring = node.body[0]
            docstring_lines.update(range(docstring.lineno, docstring.end_lineno + 1))
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        code = [token for token in tokens if token.type not in NO_CODE]
        return [token for token in code if token.start[0] not in docstring_lines]

    @cached_property
    def lines_of_code(self):
        return {token.start[0] for token in self.tokens}

    @property
    def statements(self):
        statements = [node for node in ast.walk(self.tree) if isinstance(node, ast.stmt)]
        return len(statements) - len(self.documented)

    def functions(self):
        """Name with place -> lines of code."""
        sizes = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                lines = set(range(node.lineno, node.end_lineno + 1))
                place = f"{self.path.relative_to(ROOT)}:{node.lineno} {node.name}"
                sizes[place] = len(lines & self.lines_of_code)
        return sizes

    def imports(self):
        """The first names of all modules that are imported at run time, inside functions too."""
        names = set()
        for node in walk_at_run_time(self.tree):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path} has a relative import"
                names.add(node.module.split(".")[0])
        return names


def walk_at_run_time(node):
    """All nodes, but not those under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        only_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not only_for_types:
            yield from walk_at_run_time(child)


def sources_of(name):
    """Of a root script or a folder."""
    paths = [ROOT / f"{name}.py"] if name in SCRIPTS else sorted((ROOT / name).rglob("*.py"))
    return [Source(path) for path in paths]


@pytest.fixture(scope="module")
def sources():
    return [source for name in sorted(OURS) for source in sources_of(name)]


def test_the_root_holds_the_five_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name):
    for source in sources_of(name):
        ours = source.imports() & OURS
        too_many = ours - MAY_IMPORT[name] - {name}
        assert not too_many, f"{source.path} imports {too_many}"


def test_advantage_imports_only_torch():
    [source] = sources_of("advantage")
    assert source.imports() == {"torch"}


def test_lines_hold_little(sources):
    tokens = sum(len(source.tokens) for source in sources)
    statements = sum(source.statements for source in sources)
    lines = sum(len(source.lines_of_code) for source in sources)
    assert tokens / statements <= 13
    assert tokens / lines <= 9


def test_few_lines_are_long(sources):
    lines = [line for source in sources for line in source.text.splitlines()]
    long = [line for line in lines if len(line) > 100]
    assert len(long) < 0.03 * len(lines)


def test_no_walrus_and_no_named_lambda(sources):
    for source in sources:
        for node in ast.walk(source.tree):
            walrus = isinstance(node, ast.NamedExpr)
            assignment = isinstance(node, (ast.Assign, ast.AnnAssign))
            named_lambda = assignment and isinstance(node.value, ast.Lambda)
            assert not walrus, f"{source.path}:{node.lineno}"
            assert not named_lambda, f"{source.path}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(OURS))
def test_functions_can_be_held_in_mind(name):
    most = 60 if name == "lab" else 50
    for source in sources_of(name):
        for place, size in source.functions().items():
            assert size <= most, f"{place} has {size} lines of code"


def run_elsewhere(script, flags, folder):
    """From a working directory that is not the repository."""
    command = [sys.executable, str(ROOT / script), *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_runs_from_any_folder(tmp_path):
    sizes = "--steps 1 --prompts 2 --samples 2 --minibatch 2 --max-new-tokens 8"
    validation = "--eval-problems 2 --eval-samples 1 --final-samples 1"
    flags = f"{sizes} {validation} --device cpu --name run --out {tmp_path}/runs"
    run_elsewhere("train.py", flags, tmp_path)
    assert (tmp_path / "runs" / "run" / "model" / "model.safetensors").exists()


def test_evaluation_runs_from_any_folder(tmp_path):
    flags = "base --problems 2 --samples 2 --k 1 --max-new-tokens 8 --device cpu"
    table = run_elsewhere("evaluate.py", flags, tmp_path)
    assert "Pass@1" in table
