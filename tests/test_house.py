"""Imports go down only: the floors of the house, those for type checkers included."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scripts import ran

import twostage

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE: Final = Path(twostage.__file__).parent
FLOORS: Final = [  # from the top
    "__main__",
    "demo",
    "__init__",
    "tracing",
    "run",
    "testing",
    "shards",
    "job",
    "answers",
    "journal",
    "stage",
    "core",
    "pace",
    "running",
    "observing",
    "failing",
    "errors",
    "base",
]


def modules() -> dict[str, Path]:
    """Returns each module's file, by its name within the package."""
    names = {
        path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(path: Path) -> Iterator[str]:
    """Gives the modules of the package that a module imports, by the same names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "twostage":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else module or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "twostage":
                    yield alias.name.partition(".")[2] or "__init__"


MODULES: Final = modules()


def test_each_module_has_its_floor() -> None:
    assert {module.partition(".")[0] for module in MODULES} == {*FLOORS}


def test_imports_go_down() -> None:
    up = {
        f"{module} -> {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if FLOORS.index(imported.partition(".")[0]) < FLOORS.index(module.partition(".")[0])
    }
    assert up == set()


def test_no_two_files_import_each_other_in_a_circle() -> None:
    below = {module: {*imports(path)} & {*MODULES} for module, path in MODULES.items()}
    while free := {module for module, imported in below.items() if not imported & {*below}}:
        below = {module: imported for module, imported in below.items() if module not in free}
    assert not below


def test_init_names_the_public_face_and_nothing_else() -> None:
    public = {name for name in vars(twostage) if not name.startswith("_") and name not in FLOORS}
    assert public == {*twostage.__all__}


def test_what_a_plain_job_does_not_need_is_not_imported() -> None:
    code = (
        "import sys, twostage; print(*sorted(name for name in sys.modules if name.startswith('twostage.')))"
    )
    loaded = set(ran(code).stdout.split())
    assert {name for name in loaded if name.startswith("twostage.tracing.")} == {"twostage.tracing.trace"}
    assert not {name for name in loaded if name.startswith(("twostage.testing", "twostage.demo"))}
    assert not {"twostage.journal.recorder", "twostage.journal.file", "sqlite3"} & loaded
