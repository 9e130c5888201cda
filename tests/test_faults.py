"""docs/faults.md: every fault in its tables names a test that exists."""

import ast
import re

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs/faults.md").read_text()


def rows() -> list[str]:
    """Of the tables, without their heads."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith("| fault |")]


@pytest.mark.parametrize("row", rows())
def test_every_fault_has_a_test_that_exists(row):
    fault, what_happens, command = row.strip("| ").split(" | ")
    file, name = re.fullmatch(r"`(tests/\w+\.py)::(\w+)`", command).groups()
    tree = ast.parse((ROOT / file).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert name in functions
    assert name.startswith("test_")


def test_no_test_stands_for_two_faults():
    commands = [row.rpartition(" | ")[2] for row in rows()]
    assert len(commands) == len(set(commands)) > 40
