"""The package runs on the oldest Python that setup.py names: nothing that only newer ones have."""

import ast
from pathlib import Path

import mask2former_plugin

PACKAGE = Path(mask2former_plugin.__file__).parent
FOLDERS = [PACKAGE] + [Path(__file__).resolve().parents[1] / name for name in ("tools", "datasets")]
TYPES = set("str int float bool bytes list dict tuple set type Any Callable Sequence Path Tensor".split())


def _annotations(tree):
    """Nodes that ``from __future__ import annotations`` keeps from being evaluated."""
    delayed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    roots = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")] if delayed else []
    return {id(node) for root in roots if root is not None for node in ast.walk(root)}


def _is_type(node):
    is_none = isinstance(node, ast.Constant) and node.value is None
    return is_none or getattr(node.value if isinstance(node, ast.Subscript) else node, "id", None) in TYPES


def _newer_than_39(tree):
    ignored = _annotations(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            keywords = {keyword.arg for keyword in node.keywords}
            if (name == "zip" and "strict" in keywords) or (name == "dataclass" and keywords & {"slots", "kw_only"}):
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and id(node) not in ignored:
            if _is_type(node.left) or _is_type(node.right):
                yield node.lineno, ast.unparse(node)


def test_the_search_finds_what_it_should():
    source = "x: int | None\ny = dict[str, int] | None\nzip(a, b, strict=True)\nz = mask | other\n"
    assert sorted(line for line, _ in _newer_than_39(ast.parse(source))) == [1, 2, 3]
    delayed = "from __future__ import annotations\n" + source
    assert sorted(line for line, _ in _newer_than_39(ast.parse(delayed))) == [3, 4]


def test_nothing_newer_than_python_3_9():
    found = []
    for path in sorted(path for folder in FOLDERS for path in folder.glob("**/*.py" if folder == PACKAGE else "*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 9))  # refuses newer syntax
        found += [f"{path}:{line}: {code}" for line, code in _newer_than_39(tree)]
    assert not found, "use Optional and Union where it is evaluated, and zip without strict:\n" + "\n".join(found)
