"""What a module or a help text does not need, it does not import: the model libraries take seconds."""

import json
import subprocess
import sys

import pytest

MODEL_LIBRARIES = ["transformers", "peft"]
HEAVY = [*MODEL_LIBRARIES, "safetensors", "huggingface_hub", "prosocial_ext.demo", "prosocial_ext.arm",
         "prosocial_ext.decoding"]  # fmt: skip
STEPS = {  # done one after the other in one process, the light before the heavy; each with what it must not import
    "import prosocial_ext": HEAVY,
    "--help": HEAVY,
    "env --help": HEAVY,
    "env": HEAVY,
    "direg --help": HEAVY,
    "direg apply --help": HEAVY,
    "generate --help": HEAVY,
    "eval --help": HEAVY,
    "import prosocial_ext.decoding": MODEL_LIBRARIES,
    "import prosocial_ext.evaluation": MODEL_LIBRARIES,
}

CODE = """
import contextlib, io, json, sys
def imported(step):
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()):
        if step.startswith("import "):
            exec(step)
        else:
            from prosocial_ext.cli import main
            try:
                status = main(step.split())
            except SystemExit as stop:
                status = stop.code
            assert status == 0, (step, status)
    return sorted(set(sys.modules) - before)
print(json.dumps({step: imported(step) for step in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The modules that each step imported which no earlier one had."""
    command = [sys.executable, "-c", CODE, json.dumps(list(STEPS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("step", STEPS)
def test_no_step_imports_what_it_does_not_need(imported: dict[str, list[str]], step: str) -> None:
    assert not set(STEPS[step]) & set(imported[step])


def test_the_modules_that_a_step_imports_are_seen(imported: dict[str, list[str]]) -> None:
    for name in ("prosocial_ext", "prosocial_ext.decoding", "prosocial_ext.evaluation"):
        assert name in imported[f"import {name}"]
