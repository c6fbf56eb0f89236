"""The layers of the house: who may import whom, drawn from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "everlong"

BELOW = {
    "config": set(),
    "ops": {"config"},
    "nn": {"ops", "config"},
    "data": {"config"},
    "mixers": {"nn", "ops", "config"},
    "models": {"mixers", "nn", "ops", "data", "config"},
}
BELOW["train"] = BELOW["generate"] = BELOW["interop"] = BELOW["models"] | {"models"}
BELOW["adapt"] = BELOW["train"] | {"train", "generate", "interop"}
BELOW["serve"] = BELOW["lab"] = BELOW["adapt"] | {"adapt"}
BELOW["cli"] = BELOW["lab"] | {"lab", "serve"}
BELOW["__main__"] = {"cli"}
# The package itself offers names from below, imported when they are asked for.
BELOW["__init__"] = {"models", "generate", "mixers", "ops"}


def layer_of(module: str) -> str | None:
    """The layer of an absolute module name; None for what is not ours or is the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "everlong" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    """The layers that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {layer_of(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            found |= {
                layer_of(f"{module}.{name.name}") if module == "everlong" else layer_of(module) for name in node.names
            }
    return found - {None}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in BELOW, f"{own} is no layer of the design"
    allowed = BELOW[own] | {own, "__version__"}
    assert imports(path) <= allowed, f"{path.name} of {own} may import {sorted(BELOW[own])}"


def test_no_catch_all_modules():
    assert not {path.stem for path in FILES} & {"utils", "misc", "common", "helpers"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_environment_is_read_at_the_edges_only(path):
    inside = path.relative_to(PACKAGE)
    if inside.parts[0] == "cli" or str(inside) == "ops/dispatch.py":
        return
    names = {
        node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }
    assert not names & {"environ", "getenv"}
