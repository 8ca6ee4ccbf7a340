"""The house's rules, read from the source: doors, heavy imports, sizes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "septet"

# room -> rooms it may import. Base modules (files directly under septet/) may be imported by all.
LEVELS = [
    {"hub", "kernels", "grammar"},
    {"quant", "kv", "text"},
    {"weights", "layers"},
    {"models"},
    {"engine"},
    {"session", "advisor"},
    {"serve", "bench"},
    {"cli"},
]
SIDEWAYS = {
    ("layers", "weights"),
    ("layers", "quant"),
}
FORBIDDEN = {  # room -> top-level modules it must not import, even late
    "base": {"torch", "numpy", "starlette", "msgspec"},
    "hub": set(),
    "kv": {"torch", "numpy"},
    "text": {"torch", "transformers"},
    "grammar": {"torch", "transformers", "tokenizers"},
    "advisor": {"torch", "numpy", "starlette"},
    "session": {"torch", "starlette", "uvicorn"},
    "serve": {"torch", "numpy"},
    "engine": {"starlette", "uvicorn", "tokenizers", "jinja2"},
}
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "rich",
    "uvicorn",
    "starlette",
    "prompt_toolkit",
    "llguidance",
}
LONG_FUNCTION, LONG_CLASS, LONG_FILE, MANY_ATTRIBUTES = 60, 500, 600, 15
EXCEPTIONS: dict[str, str] = {}  # "path:name" -> why it may be long


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "base"


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, only for type checking) of each import, wherever it stands."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in typing_only))
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_doors_go_down_only(path: Path) -> None:
    here = room(path)
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for module, _ in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "septet" or len(parts) < 2:
            continue
        target = parts[1] if (ROOT / parts[1]).is_dir() else "base"
        if target in ("base", here) or (here, target) in SIDEWAYS:
            continue
        assert here != "base" or path.name == "__init__.py", f"base imports {module}"
        if here != "base":
            assert level[target] < level[here], f"{here} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_do_not_know_what_they_must_not(path: Path) -> None:
    banned = FORBIDDEN.get(room(path), set())
    for module, typing_only in imports(ast.parse(path.read_text())):
        assert typing_only or module.split(".")[0] not in banned, f"{room(path)} may not import {module}"
        assert module.split(".")[0] not in ("pickle", "cloudpickle", "dill", "shelve"), "pickle is never used"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_no_init_imports_a_heavy_thing(path: Path) -> None:
    if path.parent.name == "triton":
        return  # the package is the heavy thing
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not {name.split(".")[0] for name in names} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_stay_livable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LONG_FILE
    for node in ast.walk(ast.parse(text)):
        name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}"
        if name in EXCEPTIONS:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONG_FUNCTION, f"{name} is long"
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < LONG_CLASS, f"{name} is long"
            assert len(_attributes(node)) <= MANY_ATTRIBUTES, f"{name} has many attributes: {sorted(_attributes(node))}"


def _attributes(cls: ast.ClassDef) -> set[str]:
    """Names that methods assign on self."""
    return {
        target.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


def test_the_map_of_the_house_names_every_module() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    rooms = page.split("```")[1]
    named = set(re.findall(r"[\w*]+", rooms))
    prefixes = tuple(name.rstrip("*") for name in named if name.endswith("*"))
    inside = ("harness", "parsers", "triton", "native")  # named as a whole
    missing = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.name[0] != "_"
        and not set(path.relative_to(ROOT).parts[:-1]) & set(inside)
        and path.stem not in named
        and not path.stem.startswith(prefixes)
    ]
    assert missing == [], "docs/architecture.md, Rooms"
