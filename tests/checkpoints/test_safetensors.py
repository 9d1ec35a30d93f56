"""Safetensors files: what is read, what is refused, what is written."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import MAX_HEADER, parse_header
from prosocial_ext.checkpoints.safetensors_writer import SafetensorsWriter
from tests.asserts import assert_same_bits
from tests.direg.files import safetensors_bytes, with_header

TENSORS = {
    "half": torch.arange(5).to(torch.float16),
    "brain": torch.arange(6).to(torch.bfloat16).view(2, 3),
    "single": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "double": torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).double(),
    "whole": torch.arange(3),
    "none": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_every_tensor_of_the_library_s_files_is_read(path: Path) -> None:
    safetensors.torch.save_file(TENSORS, path, {"made": "here"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"made": "here"}
        for name, tensor in TENSORS.items():
            assert file.entries[name].shape == tuple(tensor.shape)
            assert_same_bits(file.read(name).view(tensor.shape), tensor, name)


def test_parts_and_single_elements_are_read(path: Path) -> None:
    safetensors.torch.save_file(TENSORS, path)
    with SafetensorsFile(path) as file:
        assert_same_bits(file.read("single", 2, 5), TENSORS["single"][2:5])
        at = torch.tensor([0, 3, 6])
        assert_same_bits(file.gather("single", at), TENSORS["single"][at])
        assert file.gather("single", at[:0]).shape == (0,)


def test_tensors_at_odd_addresses_are_read(path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    data = safetensors_bytes({"a": ("U8", [1], b"x"), "b": ("F32", [2], values.numpy().tobytes())})
    path.write_bytes(data)
    with SafetensorsFile(path) as file:
        assert_same_bits(file.read("b"), values)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ([], "JSON object"),
        ({"w": 3}, "'w' of .* must have dtype, shape and data_offsets"),
        ({"w": {**GOOD, "more": 1}}, "'w' of .* must have dtype"),
        ({"w": {**GOOD, "dtype": "F31"}}, "dtype of tensor 'w' .* must be one of"),
        ({"w": {**GOOD, "dtype": ["F32"]}}, "dtype of tensor 'w'"),
        ({"w": {**GOOD, "shape": [3]}}, "shape of tensor 'w' .* must fill its 8 bytes, got F32"),
        ({"w": {**GOOD, "shape": [-2]}}, "shape of tensor 'w' .* list of sizes"),
        ({"w": {**GOOD, "shape": [2.0]}}, "no such number"),
        ({"w": {**GOOD, "shape": [True, 2]}}, "shape of tensor 'w'"),
        ({"w": {**GOOD, "shape": [2**62, 2**62]}}, "shape of tensor 'w' .* must fill"),
        ({"w": {**GOOD, "shape": [10**30]}}, "64-bit integers"),
        ({"w": {**GOOD, "shape": [1] * 65}}, "at most 64 dimensions"),
        ({"w": {**GOOD, "data_offsets": [8, 0]}}, "start <= stop"),
        ({"w": {**GOOD, "data_offsets": [0]}}, "start <= stop"),
        ({"w": {**GOOD, "data_offsets": [0, 16], "shape": [4]}}, "must have the 16 bytes that the header tells, got 8"),
        ({"w": {**GOOD, "data_offsets": [4, 8], "shape": [1]}}, "must start at byte 0 .* got 4"),
        ({"w": GOOD, "v": GOOD}, "must start at byte 8 of the data"),
        ({"w": {**GOOD, "data_offsets": [0, 4], "shape": [1]}}, "must have the 4 bytes"),
        ({"w": GOOD, "__metadata__": {"a": 1}}, "must map strings to strings"),
        ({"w": GOOD, "__metadata__": None}, "must map strings to strings"),
        ({"w\ud800": GOOD}, "UTF-8"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:60],
)
def test_a_header_that_contradicts_itself_is_refused(path: Path, header: object, match: str) -> None:
    refused(path, with_header(json.dumps(header).encode(), bytes(8)), match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "begin with the length"),
        (b"1234567", "begin with the length"),
        (struct.pack("<Q", 9) + b"{}      ", "at most 8 bytes, got 9"),
        (struct.pack("<Q", 2**63) + b"{}", "at most 2 bytes"),
        (with_header(b"{" * 1000, b""), "JSON object in UTF-8"),
        (with_header(b'{"a":' * 100_000, b""), "JSON object in UTF-8"),
        (with_header('{"a":1}'.encode("utf-16"), b""), "JSON object"),
        (with_header(b'{"\xff": 1}', b""), "UTF-8"),
        (with_header(b'{"a": NaN}', b""), "no such number"),
        (with_header(b'{"a": 1, "b": 2, "a": 3}', b""), "name every key once, got 'a' twice"),
        (with_header(b'{"a": {"dtype": "F32", "dtype": "F32"}}', b""), "got 'dtype' twice"),
        (with_header(b'{"a": ' + b"9" * 1_000_000 + b"}", b""), "64-bit integers"),
    ],
    ids=[
        "empty",
        "short",
        "longer",
        "huge",
        "open",
        "deep",
        "utf16",
        "latin",
        "nan",
        "twice",
        "twice_inside",
        "digits",
    ],
)
def test_bytes_that_are_no_header_are_refused(path: Path, data: bytes, match: str) -> None:
    refused(path, data, match)


def test_a_header_beyond_the_cap_is_refused_before_it_is_read(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER} bytes"):
        SafetensorsFile(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in ("pipe", "."):
        with pytest.raises(CheckpointError, match="regular file"):
            SafetensorsFile(tmp_path / place)
    with pytest.raises(CheckpointError, match="readable file, got No such file"):
        SafetensorsFile(tmp_path / "nothing")


def test_a_file_that_shrinks_is_an_error_and_no_signal(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(100_000)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match="keep its"):
            file.read("w")


def test_names_from_files_are_shown_without_control_characters(path: Path) -> None:
    header = json.dumps({"w\x1b[31m\n": {**GOOD, "dtype": "F31"}}).encode()
    path.write_bytes(with_header(header, bytes(8)))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


VALID = safetensors.torch.save(
    {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.float16), "c": torch.tensor([1, 2], dtype=torch.uint8)},
    {"k": "v"},
)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_is_what_the_library_reads(path: Path, data: st.DataObject) -> None:
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["byte", "digit", "cut", "insert", "repeat"]))
        if kind == "byte":
            damaged[place] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            damaged[place] = data.draw(st.sampled_from(b'0123456789-{}[]",:'))
        elif kind == "cut":
            del damaged[place : place + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            damaged[place:place] = damaged[place : place + data.draw(st.integers(1, 60))]
        damaged = damaged or bytearray(b"x")
    path.write_bytes(damaged)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    with file:
        ours = {name: (e.dtype, list(e.shape), file.read_bytes(file.data_start + e.start, file.data_start + e.stop))
                for name, e in file.entries.items()}  # fmt: skip
    theirs = {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in
              safetensors.deserialize(bytes(damaged))}  # fmt: skip
    assert {name: (dtype, shape, bytes(raw.tolist())) for name, (dtype, shape, raw) in ours.items()} == theirs


# ---- writing


def test_the_library_reads_what_is_written_in_any_order(path: Path) -> None:
    with open(path, "w+b") as file:
        writer = SafetensorsWriter(file.fileno(), room=512)
        a, b = writer.add("a", "BF16", (2, 2)), writer.add("b", "I64", (3,))
        writer.write(b + 8, torch.tensor([5, 6]))
        writer.write(a, torch.ones(4, dtype=torch.bfloat16))
        writer.finish({"k": "v"})
    found = safetensors.torch.load_file(path)
    assert_same_bits(found["a"], torch.ones(2, 2, dtype=torch.bfloat16))
    assert found["b"].tolist() == [0, 5, 6]
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"k": "v"}


def test_a_written_header_parses_to_what_was_written(path: Path) -> None:
    safetensors.torch.save_file(TENSORS, path)
    with SafetensorsFile(path) as file:
        from prosocial_ext.checkpoints.safetensors_header import render_header

        again = render_header(list(file.entries.values()), {}, 4096)
        assert len(again) == 4096
        data_bytes = file.size - file.data_start
        assert parse_header(again[8:], data_bytes, "x").entries == file.entries
