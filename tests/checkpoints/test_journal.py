"""Notes of what is complete: whatever is not, to the last bit, a note of this job and piece counts as none."""

import os
from pathlib import Path

import pytest

from prosocial_ext.checkpoints.journal import Journal

FACTS = {"words": 2**64 - 1, "norm": 0.1 + 0.2, "least": float("inf"), "by": {"w": [1, 2]}, "none": None}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    found = Journal(tmp_path, "job")
    found.add("a", FACTS)
    return found


def test_a_note_comes_back_to_the_bit(journal: Journal) -> None:
    assert journal.read("a") == FACTS
    assert journal.read("b") is None
    journal.add("a", {"other": 1})
    assert journal.read("a") == {"other": 1}


def test_a_note_of_another_job_or_piece_is_none(journal: Journal, tmp_path: Path) -> None:
    assert Journal(tmp_path, "another").read("a") is None
    (tmp_path / "a").rename(tmp_path / "b")
    assert journal.read("b") is None


def test_a_note_that_is_torn_or_damaged_is_none(journal: Journal, tmp_path: Path) -> None:
    place = tmp_path / "a"
    content = place.read_bytes()
    for i in range(len(content)):
        place.write_bytes(content[:i])
        assert journal.read("a") is None
        place.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert journal.read("a") is None
    place.write_bytes(content + b" ")
    assert journal.read("a") is None
    place.write_bytes(content)
    assert journal.read("a") == FACTS


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_none_and_is_replaced(journal: Journal, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a"
    place.rename(tmp_path / "elsewhere")
    if kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    assert journal.read("a") is None
    if kind != "folder":
        journal.add("a", {"other": 1})
        assert journal.read("a") == {"other": 1}
