"""Reads and runs the README's blocks. `python tests/readme.py README.md` runs them with whatever is installed."""

import re
import sys
from pathlib import Path


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language, each with the line number of its first line."""
    found = re.finditer(rf"^```{language}[ \t]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block.group(1)) for block in found]


def run_python(path: Path) -> int:
    """Execute every Python block in order in one namespace, keeping its line numbers; return their number."""
    namespace: dict[str, object] = {"__name__": "readme"}
    snippets = blocks(path.read_text(encoding="utf-8"), "python")
    for line, code in snippets:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
    return len(snippets)


if __name__ == "__main__":
    print(f"{run_python(Path(sys.argv[1]))} snippets of {sys.argv[1]} ran")
