"""The full demo with hardly any training: every part runs, and the same seed gives the same file."""

import io
from contextlib import redirect_stdout

import pytest
import torch

from prosocial_ext import cli
from prosocial_ext.demo import settings as of
from prosocial_ext.demo.grammar import ATTRIBUTES
from prosocial_ext.demo.names import BASE, RANDOM, SAFE, SALIENT, SGD
from prosocial_ext.demo.pipeline import run_demo
from prosocial_ext.demo.printing import format_results
from prosocial_ext.demo.report import build_report
from prosocial_ext.demo.results import DemoResults

Settings = of.DemoSettings


def tiny(seed, full):
    return Settings(
        seed=seed,
        full=full,
        base=of.BaseSettings(hidden=16, feed_forward=24, layers=1, heads=2, examples=64, steps=4, batch=8),
        harm=of.HarmSettings(steps=2, batch=8, pairs=16, warmup=1),
        adam_harm=of.HarmSettings(optimizer="adamw", lr=3e-4, steps=2, batch=8, pairs=16, warmup=1),
        arm=of.ArmSettings(r1=1, r2=1, steps=3, pairs=8, pairs_per_attribute=2, warmup=1),
        evaluation=of.EvaluationSettings(harm=12, held_out=8, howto=6, support=6, perplexity=8, max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's own run: the full demo with seed 0, and in its folder the demo with seed 1."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("prosocial_ext.demo.settings.DemoSettings", lambda seed, full: tiny(seed, full))
        assert cli.main(["demo", "--full", "--quiet", "--out", str(out), "--seed", "0"]) == 0
    return DemoResults.load(out), DemoResults.load(out / "seed-1"), out, printed.getvalue()


def test_the_command_leaves_report_results_and_models(run):
    _, other, out, printed = run
    made = {str(path.relative_to(out)) for path in out.glob("**/*.*") if path.is_file()}
    assert {"report.html", "results.json", "timings.json", "seed-1/results.json"} <= made
    assert {"base", "harm", "base-safe", "arm", "seed-1"} <= {path.name for path in out.iterdir()}
    assert "Seed 0" in printed
    assert "Seed 1" in printed
    assert other.settings.full is False


def test_the_same_seed_gives_the_same_file_and_another_one_another(run, tmp_path):
    *_, out, _ = run
    run_demo(tiny(1, full=False), tmp_path / "again", progress=False)
    run_demo(tiny(2, full=False), tmp_path / "other", progress=False)
    one, again, other = (
        (folder / "results.json").read_bytes() for folder in (out / "seed-1", tmp_path / "again", tmp_path / "other")
    )
    assert one == again
    assert one != other


def test_every_dose_rule_and_surgery_is_there(run):
    results = run[0]
    edits = [row.edit for row in results.safety if row.edit]
    assert {(e.density, round(e.scale, 6)) for e in edits if e.copy == SGD and e.rule not in (RANDOM, SALIENT)} == {
        (density, scale) for density in (0.001, 0.01, 0.1, 1.0) for scale in (0.5, 1.0, 2.0, 3.0)
    }
    assert len({row.name for row in results.safety}) == len(results.safety)
    assert [(arm.surgery, arm.preference_per) for arm in results.arms] == [
        ("pcgrad", "row"),
        ("none", "row"),
        ("none", "step"),
        ("pcgrad", "step"),
        ("pcgrad_active", "step"),
        ("unit_norm", "step"),
        ("pcgrad", "row"),
        ("pcgrad", "row"),
    ]
    assert [arm.trained_on for arm in results.arms] == [SAFE] * 6 + [BASE, SAFE]
    assert [arm.beta_r for arm in results.arms] == [1.0] * 7 + [0.1]
    assert len(results.sharp) == 5 * len(ATTRIBUTES)
    assert {row.guidance for row in results.mip} == {0.5, 1.0, 2.0, 4.0, 8.0, 16.0}
    assert {(row.trained_on, row.guidance) for row in results.guided} == {(SAFE, 1), (SAFE, 4), (BASE, 1), (BASE, 4)}
    cells = [generation.cell for generation in results.generations]
    assert len(set(cells)) * 6 <= len(cells)


def test_nobody_keeps_their_own_preference_when_shuffled(run):
    people = torch.tensor(run[0].preferences)
    assert people.shape == (6, len(ATTRIBUTES))
    assert not (people == people.roll(1, dims=0)).all(dim=1).any()


def test_the_report_of_two_seeds_has_all_sections(run):
    one, other, out, _ = run
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("How strong may guidance be?", "Does projection help?", "unit norm", "seed 1", "--full"):
        assert words in page
    assert page.count("data:image/svg+xml") == 8
    assert build_report([one, other]).html() == page  # the files alone say everything
    assert "compare surgeries" in format_results(one)


def test_a_missing_matplotlib_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--quiet", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'prosocial_ext[report]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
