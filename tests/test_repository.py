"""Laws of the source tree that no linter knows."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prosocial_ext
from prosocial_ext import ops, reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "prosocial_ext").rglob("*.py"), *(ROOT / "python_ref").rglob("*.py")])
REFERENCE = sorted((ROOT / "python_ref").rglob("*.py"))
OPS = sorted(set(ops.__all__) - {"backend"})

# Written so that this file does not match: places of one machine, and addresses that belong to the user's pip settings.
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home|Users)/\w")
REGISTRY = re.compile(r"(?:pypi|pythonhosted|download\.pytorch)\.org|--(?:extra-)?index-url")


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_text() -> Iterator[tuple[str, str]]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # pictures; deleted but not yet committed
            continue


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine_path", "registry_address"])
def test_no_tracked_file_mentions(pattern: re.Pattern[str]) -> None:
    own = identifier(Path(__file__))
    found = [
        f"{name}: {match.group()}" for name, text in tracked_text() if name != own for match in pattern.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize("path", REFERENCE, ids=identifier)
def test_the_reference_imports_torch_the_standard_library_and_itself_alone(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        else:
            continue  # relative: itself
        for module in modules:
            assert module.split(".")[0] in allowed, f"line {node.lineno} imports {module}; itself is imported as ."


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_every_public_function_and_module_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has none"
    bare = [f"{node.name}, line {node.lineno}" for node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert bare == []


KERNELS = sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "cuda").glob("*.cuh")])


@pytest.mark.parametrize("path", [path for path in KERNELS if path.name != "simt.cuh"], ids=identifier)
def test_kernels_use_the_subset_of_cuda_that_the_harness_has(path: Path) -> None:
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"\basm\b|\bcub\b|__threadfence\w*|__sync\w+|\batomic[A-Z]\w*|__shared__|<<<", text)
    assert found == [], "only csrc/cuda/simt.cuh may"


def test_ops_and_reference_have_the_same_names() -> None:
    assert sorted(set(getattr(reference, "__all__", []))) == OPS


@pytest.mark.parametrize("name", OPS)
def test_ops_and_reference_have_the_same_signature(name: str) -> None:
    compiled, defining = getattr(ops, name), getattr(reference, name)
    if inspect.isclass(defining):
        assert compiled is defining  # a result class exists once, or isinstance fails
    else:
        assert inspect.signature(compiled) == inspect.signature(defining)


def test_every_exported_name_exists_once() -> None:
    for module in (prosocial_ext, ops):
        assert len(set(module.__all__)) == len(module.__all__)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_the_version_is_written_once() -> None:
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert written is not None
    assert prosocial_ext.__version__ == written.group(1)
