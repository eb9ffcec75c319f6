"""The layers of the package, as a table of who may import whom, and other rules that a parser can check."""

import ast
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdeq

ROOT = Path(__file__).parent.parent
PACKAGE = sorted(path.relative_to(ROOT / "mdeq").as_posix() for path in (ROOT / "mdeq").rglob("*.py"))
PROGRAMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").rglob("*.py"))

# File of mdeq/ -> what it may import beside the standard library; a dot stands for mdeq. The first match counts.
TABLE = {
    # 0 numerics: tensors (B, D) and a callable
    "solvers/base.py": "torch",
    "solvers/__init__.py": ".solvers.*",
    "solvers/*.py": "torch .solvers.base",
    "jacobian.py": "torch .solvers",
    # 1 differentiation; geometry
    "reversible.py": "torch .jacobian .solvers",
    "gradients.py": "torch .jacobian .reversible .solvers",
    "state.py": "torch",
    "layers.py": "torch",
    # 2 the equilibrium layer
    "deq.py": "torch .solvers .gradients .jacobian .state",
    "capture.py": "torch .deq .layers .solvers",
    # 3 models
    "models/__init__.py": ".models .models.*",
    "models/cell.py": "torch .layers .state",
    "models/head.py": "torch .layers .state",
    "models/listing.py": "timm",
    "models/fit.py": "torch timm .models.listing",
    "models/official.py": "torch .models.backbone .models.fit .models.transfer",
    "models/weights.py": "huggingface_hub timm",
    "models/*.py": "torch timm .deq .gradients .layers .solvers .state .models.*",
    # the public names
    "_version.py": "",
    "__init__.py": "._version .capture .deq .gradients .jacobian .models .reversible .solvers .state",
}


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=path)


def imports(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every module that a file imports, absolute from mdeq as a leading dot, and the names taken from it."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module or ""
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *module.split(".")]
                module = "." + ".".join(part for part in parts[1:] if part)
            yield module, names


def allowed(module: str, rule: str) -> bool:
    if module.split(".")[0] in sys.stdlib_module_names:
        return True
    return any(fnmatch.fnmatch(module, item) or module.startswith(f"{item}.") for item in rule.split() if item != ".")


@pytest.mark.parametrize("file", PACKAGE)
def test_imports_of_the_package(file: str) -> None:
    rules = [rule for pattern, rule in TABLE.items() if fnmatch.fnmatch(file, pattern)]
    assert rules, f"mdeq/{file} has no row in the table"
    modules = [module for module, _ in imports(f"mdeq/{file}")]
    assert [module for module in modules if not allowed(module, rules[0])] == []


def test_table_has_no_dead_rows() -> None:
    dead = [pattern for pattern in TABLE if not any(fnmatch.fnmatch(file, pattern) for file in PACKAGE)]
    assert dead == []


def test_the_checker_sees_imports() -> None:
    """What the test above would say of a file that broke the rule."""
    assert ("torch", ["Tensor", "nn"]) in list(imports("mdeq/deq.py"))
    names = ["FixedPointSolver", "_require", "_require_number"]
    assert (".solvers.base", names) in list(imports("mdeq/solvers/picard.py"))
    assert (".state", ["State", "lies_channels_last"]) in list(imports("mdeq/models/cell.py"))
    assert not allowed("timm", TABLE["deq.py"])
    assert not allowed("torchvision", TABLE["deq.py"])
    assert not allowed(".models.mdeq", TABLE["deq.py"])
    assert not allowed(".deq", TABLE["gradients.py"])


@pytest.mark.parametrize("file", PROGRAMS)
def test_programs_use_public_names(file: str) -> None:
    for module, names in imports(file):
        assert not module.startswith("."), "tools are not installed: import tools.x absolutely"
        if module.split(".")[0] == "mdeq":
            assert module == "mdeq"
            assert set(names) <= set(mdeq.__all__), f"private: {sorted(set(names) - set(mdeq.__all__))}"
    used = {
        node.attr
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mdeq"
    }
    assert used <= set(mdeq.__all__), f"private: {sorted(used - set(mdeq.__all__))}"


def test_the_map_of_the_programs_names_every_file_once() -> None:
    lines = (ast.get_docstring(tree("tools/__init__.py")) or "").splitlines()
    listed = [name for line in lines if line.startswith("    ") for name in line.strip().split("  ")[0].split(", ")]
    assert sorted(listed) == sorted(Path(file).stem for file in PROGRAMS if file != "tools/__init__.py")


def test_public_names_exist() -> None:
    assert len(set(mdeq.__all__)) == len(mdeq.__all__)
    assert [name for name in mdeq.__all__ if not hasattr(mdeq, name)] == []


@pytest.mark.parametrize("file", [f"mdeq/{file}" for file in PACKAGE] + PROGRAMS)
def test_rules(file: str) -> None:
    """No file over 500 lines, no global, no eval, no star import; in mdeq/ no print, and imports at the top only."""
    assert len((ROOT / file).read_text().splitlines()) <= 500
    module = tree(file)
    called = {n.func.id for n in ast.walk(module) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec"}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(module))
    assert not any("*" in names for _, names in imports(file))
    if file.startswith("mdeq/"):
        assert "print" not in called
        functions = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]
        inner = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert inner == []
        assert ("sys", "path") not in {
            (n.value.id, n.attr)
            for n in ast.walk(module)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
