"""Paths, JSON and folders that appear whole."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

import jlora
from jlora import _files


@pytest.mark.parametrize(
    "path", ["run:1", "a/gs:/b", "C:/models", "./s3", "über/x", "~"]
)
def test_local_paths(path):
    assert _files.local_path(path) == Path(os.path.abspath(os.path.expanduser(path)))


@pytest.mark.parametrize(
    "path",
    ["gs://b", "S3://b".lower(), "my+scheme://x", "hdfs:/node/x", Path("gs://b/c")],
)
def test_addresses(path):
    with pytest.raises(jlora.CheckpointError, match="is not a local path"):
        _files.local_path(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": ', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
    ],
)
def test_json_that_is_none(text, said, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(jlora.CheckpointError, match=said):
        _files.read_json(tmp_path / "x.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(jlora.CheckpointError, match="cannot be read"):
        _files.read_json(tmp_path / "folder")
    with pytest.raises(jlora.CheckpointError, match="does not exist"):
        _files.read_json(tmp_path / "x.json" / "y")


def write(target, **texts):
    stale = lambda name: name.endswith(".part")
    with _files.staged(target, "the thing", mark="mark", stale=stale) as folder:
        for name, text in texts.items():
            (folder / name.replace("_", ".")).write_text(text)


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_a_folder_is_replaced_but_for_what_is_not_its_own(tmp_path):
    target = tmp_path / "deep" / "x"
    write(target, mark="1", a_part="old", b_part="old")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((target / "mark").stat().st_mode) == 0o666 & ~mask
    (target / "notes").write_text("mine")
    write(target, mark="2", c_part="new")
    assert contents(target) == {"mark": "2", "c.part": "new", "notes": "mine"}
    assert os.listdir(target.parent) == ["x"]


@pytest.mark.parametrize("count", range(1, 6))
def test_a_replacement_that_fails_is_undone(count, tmp_path, monkeypatch):
    """At whichever of its five renames: three files go, two come."""
    target = tmp_path / "x"
    write(target, mark="1", a_part="old", b_part="old")
    rename, calls = Path.rename, []

    def failing(self, to):
        calls.append(self.name)
        if len(calls) == count:
            raise OSError("the power went off")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(jlora.CheckpointError, match=r"the thing .*power went off"):
        write(target, mark="2", c_part="new")
    monkeypatch.undo()
    assert contents(target) == {"mark": "1", "a.part": "old", "b.part": "old"}
    assert os.listdir(tmp_path) == ["x"]
    assert calls[0] == "mark"  # first away, and last in place
    assert "mark" not in calls[1:4]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        _files.staged(tmp_path / "x", "it", mark="m", stale=bool) as folder,
    ):
        (folder / "m").write_text(str(1 / 0))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 3, 5)])
def test_a_view_is_written_as_it_reads(shape, tmp_path):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).T
    _files.write_tensors(tmp_path / "x.safetensors", {"x": x})
    found = _files.read_tensors(tmp_path / "x.safetensors")["x"]
    assert found.shape == x.shape
    np.testing.assert_array_equal(found, x)
