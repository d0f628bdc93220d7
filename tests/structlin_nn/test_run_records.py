"""Records: whole lines, or an error that says where; repair after a kill."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from structlin_nn.records import COMMON_KEYS, HEADER_KEYS, SCHEMA, TASK_KEYS, RecordWriter, read_record, sealed

HEADER: dict[str, Any] = {key: {} for key in HEADER_KEYS if key != "schema"} | {
    "counts": {"steps": 20},
    "task": "cifar",
}


def evaluation(step: int) -> dict[str, Any]:
    return dict.fromkeys((*COMMON_KEYS, *TASK_KEYS["cifar"]), 0) | {"step": step}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A header and the evaluations of steps 0 and 10."""
    path = tmp_path / "record.jsonl"
    writer = RecordWriter.create(path, HEADER)
    writer.append(evaluation(0))
    writer.append(evaluation(10))
    assert writer.size == path.stat().st_size
    return path


def test_what_is_written_is_read(path: Path) -> None:
    record = read_record(path)
    assert record.header == {"kind": "header", "schema": SCHEMA, **HEADER, "recipe": "cifar"}
    assert [line["step"] for line in record.evaluations] == [0, 10]
    assert not record.finished
    RecordWriter.reopen(path, path.stat().st_size)[0].append(evaluation(20))
    assert read_record(path).finished


class TestDamage:
    def test_cut_off_line(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ValueError, match=r"record.jsonl, line 3 is cut off"):
            read_record(path)

    def test_last_line_without_its_end_is_cut_off_too(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="line 3 is cut off"):
            read_record(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{\n", "line 4 is damaged"),
            (b"[1]\n", "line 4 must be a JSON object"),
            (sealed({"kind": "other"}), "line 4 must be an evaluation, it is 'other'"),
            (sealed({"kind": "evaluation", "step": 11}), "line 4 must be an evaluation, it lacks samples"),
            (b'{"kind": "evaluation", "step": 11}\n', "line 4 is damaged: it has no checksum"),
        ],
    )
    def test_other_lines(self, path: Path, line: bytes, message: str) -> None:
        path.write_bytes(path.read_bytes() + line)
        with pytest.raises(ValueError, match=message):
            read_record(path)

    def test_every_bit_counts(self, path: Path) -> None:
        """Flips of one bit anywhere in a record are seen: 100 of 100."""
        good, generator = path.read_bytes(), random.Random(0)
        for _ in range(100):
            raw = bytearray(good)
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
            path.write_bytes(raw)
            with pytest.raises(ValueError, match=r"damaged|cut off|schema"):
                read_record(path)

    def test_steps_that_fall(self, path: Path) -> None:
        RecordWriter.reopen(path, path.stat().st_size)[0].append(evaluation(10))
        with pytest.raises(ValueError, match=r"must rise, got \[0, 10, 10\]"):
            read_record(path)

    def test_no_header(self, path: Path) -> None:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
        with pytest.raises(ValueError, match=r"line 1 must be a header of schema 2 to 4, got kind 'evaluation'"):
            read_record(path)

    def test_other_schema(self, path: Path) -> None:
        header, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(json.dumps(json.loads(header) | {"schema": 5}).encode() + b"\n" + rest)
        with pytest.raises(ValueError, match=r"checksum is wrong|schema 5"):
            read_record(path)

    def test_empty_and_missing(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="is empty"):
            read_record(tmp_path / "empty")
        with pytest.raises(FileNotFoundError):
            read_record(tmp_path / "missing")


class TestReopen:
    def test_drops_a_torn_line_and_says_so(self, path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"kind": "eval')
        writer, messages = RecordWriter.reopen(path, len(whole))
        assert path.read_bytes() == whole
        assert len(messages) == 1
        assert "cut off after 14 bytes" in messages[0]
        writer.append(evaluation(20))
        assert read_record(path).finished

    def test_drops_lines_after_the_checkpoint_and_says_so(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines) + b"{")
        writer, messages = RecordWriter.reopen(path, len(lines[0]))
        assert path.read_bytes() == lines[0]
        assert writer.size == len(lines[0])
        assert len(messages) == 2
        assert "dropped 2 line(s)" in messages[1]

    def test_damage_of_a_line_that_stays(self, path: Path) -> None:
        """Also where lines are dropped, which are not verified: they are repeated."""
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        sizes = [len(b"".join(lines[:number])) for number in (1, 2, 3)]
        for number, start in enumerate((0, *sizes[:2])):
            raw = bytearray(whole + b"{")
            raw[start + 20] ^= 1
            path.write_bytes(raw)
            for size in sizes[number:]:
                with pytest.raises(ValueError, match=rf"record.jsonl, line {number + 1} is damaged"):
                    RecordWriter.reopen(path, size)
                assert path.read_bytes() == raw
            for size in sizes[:number]:
                assert RecordWriter.reopen(path, size)[0].size == size
                path.write_bytes(raw)

    def test_nothing_to_say(self, path: Path) -> None:
        assert RecordWriter.reopen(path, path.stat().st_size)[1] == []

    @pytest.mark.parametrize("difference", [-1, 1])
    def test_record_of_another_run(self, path: Path, difference: int) -> None:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="does not belong to the checkpoint"):
            RecordWriter.reopen(path, len(before) + difference)
        assert path.read_bytes() == before


def test_numbers_that_json_lacks_are_refused(path: Path) -> None:
    before = path.read_bytes()
    writer, _ = RecordWriter.reopen(path, len(before))
    with pytest.raises(ValueError, match="JSON"):
        writer.append(evaluation(20) | {"test_loss": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("schema", "task", "whole"), [(2, "cifar", False), (2, "gpt2", True), (3, "gpt2", False), (3, "imagenet", False)]
)
def test_earlier_schemas_lack_statistics(schema: int, task: str, whole: bool, tmp_path: Path) -> None:
    header = {"kind": "header", **HEADER, "schema": schema, "task": task}
    keys = [key for key in (*COMMON_KEYS, *TASK_KEYS[task]) if key != "statistics"]
    line = {"kind": "evaluation", **dict.fromkeys(keys, 0), "step": 3}
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
    if whole:
        assert read_record(path).header["task"] == task
    else:
        with pytest.raises(ValueError, match="line 2 must be an evaluation, it lacks statistics"):
            read_record(path)
