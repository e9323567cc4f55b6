"""What files.py writes is whole or absent: whichever step fails, the old one is still there."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from nanogsm import UserError
from nanogsm.store import files


def test_atomic_write_keeps_the_old_file_until_the_new_is_whole(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "f", [], os.replace
    path.write_bytes(b"old")

    def watch(source, target):
        seen.append((Path(source).parent, Path(source).read_bytes(), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    files.replace_file(path, b"new", shared=True)
    assert seen == [(tmp_path, b"new", b"old")] and path.read_bytes() == b"new"

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.replace_file(path, b"newer", shared=True)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]
    with pytest.raises(OSError) as caught:  # and not the clearing away, which fails as well
        files.replace_file(tmp_path / ("f" * 300), b"new")
    assert caught.value.errno == errno.ENAMETOOLONG and caught.value.__context__ is None


def test_json_is_atomic_and_valid_without_nan(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": float("nan"), "b": [float("-inf"), 1.5, (True,)], "c": "\ud800é"})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5, [True]], "c": "\ud800é"}
    with pytest.raises(TypeError):
        files.write_json(path, {"bad": object()})
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_json(path, {})
    assert "b" in json.loads(path.read_text()) and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_is_what_it_was(tmp_path, monkeypatch, failing):
    """The old folder is renamed away and the new one into its place. Either may fail."""
    weights = tmp_path / "model" / "weights"
    weights.parent.mkdir()
    weights.write_text("old")
    rename, calls = Path.rename, []

    def fails(self, to):
        calls.append(self)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), files.replaced_folder(tmp_path / "model") as new:
        (new / "weights").write_text("new")
    assert weights.read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_set_aside_by_a_killed_attempt_is_put_back(tmp_path):
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replaced_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    weights = tmp_path / "model" / "weights"
    assert weights.read_text() == "old" and os.listdir(tmp_path) == ["model"]
    with files.replaced_folder(tmp_path / "model") as new:
        (new / "weights").write_text("new")
    assert weights.read_text() == "new" and os.listdir(tmp_path) == ["model"]


def test_rows_with_odd_line_breaks_are_read_as_they_were_written(tmp_path):
    rows = [{"text": "a\u2028b\x85c\u2029"}, {"text": "\ud800"}]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(files.to_json, rows)))
    assert files.json_lines(tmp_path / "rows.jsonl") == rows
    for content in (b'{"a": 1}\n{"a"', b"\xff\n"):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="^cannot read .*bad.jsonl"):
            files.json_lines(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="none.jsonl: .*No such file"):
        files.json_lines(tmp_path / "none.jsonl")


def test_a_drive_that_cannot_sync_a_folder_stays_usable(tmp_path, monkeypatch):
    real, number = os.fsync, errno.EINVAL

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, "x")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    number = errno.EIO  # a drive that fails is another matter
    with pytest.raises(OSError):
        files.replace_file(tmp_path / "f", b"newer")
