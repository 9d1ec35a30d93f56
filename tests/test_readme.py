"""What the README shows, works."""

import re
from pathlib import Path

import pytest

from tests import readme

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_every_python_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the snippets may write files
    assert readme.run_python(README) == README.read_text(encoding="utf-8").count("```python")


def test_every_make_target_in_a_bash_block_exists() -> None:
    shell = "\n".join(code for _, code in readme.blocks(README.read_text(encoding="utf-8"), "bash"))
    asked = set(re.findall(r"^\s*make ([a-z]+)", shell, re.MULTILINE))
    assert asked <= make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))


def test_blocks_are_found_by_language_with_their_line() -> None:
    text = "# Title\n\n```python\na = 1\n```\n```bash\nmake test\n```\n\n```python\nb = 2\nc = 3\n```\n"
    assert readme.blocks(text, "python") == [(4, "a = 1\n"), (11, "b = 2\nc = 3\n")]
    assert readme.blocks(text, "bash") == [(7, "make test\n")]


def test_a_failing_block_names_the_line_of_the_file(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        readme.run_python(page)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 8)
