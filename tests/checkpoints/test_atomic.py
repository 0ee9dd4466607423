"""Files and folders appear whole or not at all, and a manifest notices every change."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints import atomic
from dora_cli.checkpoints.atomic import atomic_folder, atomic_write_bytes, atomic_write_text, save_tensors
from dora_cli.checkpoints.manifest import verify_manifest, write_manifest
from dora_cli.checkpoints.safetensors_io import read_header, read_tensor, write_header
from dora_cli.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "übung")
    atomic_write_bytes(tmp_path / "a.json", b"two")
    assert (tmp_path / "a.json").read_bytes() == b"two" and names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "a", "old")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "a") as folder:
        (folder / "x").write_text("1")
        (folder / "in").mkdir()
        (folder / "in" / "y").write_text("2")
        assert not (tmp_path / "deep" / "a").exists()
        assert folder.name.startswith(f".a.tmp-{atomic.HOST}-{os.getpid()}-")
    assert names(tmp_path / "deep") == ["a"] and names(tmp_path / "deep" / "a") == ["in", "x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_a_folder_that_holds_something_stays_unless_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a"):
        raise AssertionError("the block must not run")
    assert names(tmp_path / "a") == ["old"]


@pytest.mark.parametrize("system_call", [True, False])
def test_a_replaced_folder_changes_at_once(system_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not system_call:
        monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    elif sys.platform == "linux":
        renames = []
        monkeypatch.setattr(Path, "rename", lambda self, target: renames.append(target))  # none is needed
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with atomic_folder(tmp_path / "a", replace=True) as folder:
        (folder / "new").write_text("")
        assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    with pytest.raises(OSError), atomic_folder(tmp_path / "a", replace=True) as folder:
        folder.rmdir()  # so that the rename to its place fails
        (tmp_path / "elsewhere").mkdir()
        os.rename(tmp_path / "elsewhere", tmp_path / "gone")
    assert names(tmp_path / "a") == ["old"]


def test_a_killed_process_leaves_only_the_hidden_folder(tmp_path: Path) -> None:
    script = (
        "import os, sys; from dora_cli.checkpoints.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'x').write_text('1'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".a.tmp-")


# tensors


def test_views_and_shared_tensors_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "turned": whole.T, "row": whole[1], "none": whole[:0], "nil": whole[:0]}
    save_tensors(tmp_path / "t", tensors | {"wide": torch.zeros(1).expand(3)}, {"step": "4"})
    read = load_file(tmp_path / "t")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "t").stat().st_size < 1000 and names(tmp_path) == ["t"]


def test_a_tensor_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"x": torch.ones(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=5))
def test_what_safetensors_writes_is_read_equal(tmp_path_factory: Any, layout: Any) -> None:
    tensors = {n: torch.ones(s).to(d) for n, (s, d) in layout.items() if n != "__metadata__"}
    file = tmp_path_factory.mktemp("t") / "t.safetensors"
    save_file(tensors, file)
    header = read_header(file)
    assert header.keys() == tensors.keys()
    for name, entry in header.items():
        assert torch.equal(read_tensor(entry), tensors[name]) and entry.nbytes == tensors[name].nbytes


def test_a_file_begun_here_is_read_by_safetensors(tmp_path: Path) -> None:
    starts = write_header(tmp_path / "t", [("x", "F32", (2, 3)), ("y", "BF16", ()), ("z", "U8", (0, 4))])
    read = load_file(tmp_path / "t")
    assert {name: (tuple(t.shape), t.dtype) for name, t in read.items()} == {
        "x": ((2, 3), torch.float32),
        "y": ((), torch.bfloat16),
        "z": ((0, 4), torch.uint8),
    }
    assert starts["x"] % 8 == 0 and starts["y"] == starts["x"] + 24


def header_of(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few for its header"),
        (b"\xff" * 40, "too few for its header"),
        (header_of(b"{]"), "header is not JSON"),
        (header_of(b"[" * 50_000), "header is not JSON"),
        (header_of(b"[]"), "not a JSON object"),
        (header_of(b'{"x": 1}'), "entry of 'x' is incomplete"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "is incomplete"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"1234"), "wrong types"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234"), "wrong types"),
        (header_of(b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"), "unknown type F99"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"), "needs 8"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"12345678"), "starts at byte"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"123"), "its header describes"),
        (header_of(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345"), "header describes"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "t")


# manifests


def checkpoint(folder: Path) -> Path:
    (folder / "in").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(3000))
    (folder / "in" / "b.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_a_whole_folder_is_verified(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    verify_manifest(folder)
    (folder / ".nfs0001").write_text("what file systems leave behind")
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.bin").write_bytes(bytes(1204)), r"a\.bin has 1,204 bytes, its manifest says 3,000"),
        (lambda f: (f / "a.bin").write_bytes(bytes(2999) + b"1"), r"a\.bin has its 3,000 bytes, but not the content"),
        (lambda f: (f / "in" / "b.json").unlink(), r"in/b\.json is missing"),
        (lambda f: (f / "c.bin").write_bytes(b""), r"c\.bin is not in its manifest"),
        (lambda f: (f / "manifest.json").unlink(), r"it has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_bytes(b'{"files": {"a.b'), "not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a.bin": 1, "in/b.json": 1}}'), "is not an object"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../../etc/passwd": {}}}'), "is missing|is not in its"),
    ],
)
def test_every_damage_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    damage(folder)
    with pytest.raises(UserError, match=message):
        verify_manifest(folder)


# leftovers


def leave(folder: Path, name: str, *, host: str = atomic.HOST, pid: int = 1, token: str = "0" * 8) -> Path:
    path = folder / f".{name}.tmp-{host}-{pid}-{token}-0"
    path.mkdir()
    (path / "x").write_text("half")
    return path


def a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    script = (
        "import os, sys; from dora_cli.checkpoints.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'x').write_text('1'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a[1]*")], check=False)
    assert len(names(tmp_path)) == 1
    atomic_write_text(tmp_path / "other", "")
    assert len(names(tmp_path)) == 2  # not its business
    with atomic_folder(tmp_path / "a[1]*"):
        pass
    assert names(tmp_path) == ["a[1]*", "other"]


def test_only_what_is_orphaned_is_swept(tmp_path: Path) -> None:
    dead = a_dead_process()
    gone = [leave(tmp_path, "a", pid=dead), leave(tmp_path, "b", pid=os.getpid()), leave(tmp_path, "c\nd", pid=dead)]
    (tmp_path / f".f.tmp-{atomic.HOST}-{dead}-{'0' * 8}-1").write_text("half")
    kept = [
        leave(tmp_path, "a", pid=os.getppid()),
        leave(tmp_path, "a", pid=os.getpid(), token=atomic.TOKEN),
        leave(tmp_path, "a", pid=dead, host="ffffff" if atomic.HOST != "ffffff" else "000000"),
    ]
    (tmp_path / ".mine.tmp-1").write_text("")
    (tmp_path / "a").write_text("")
    assert len(atomic.sweep(tmp_path)) == len(gone) + 1
    assert names(tmp_path) == sorted([".mine.tmp-1", "a", *(path.name for path in kept)])
    assert atomic.sweep(tmp_path / "nowhere") == []


def test_in_a_folder_of_ones_own_everything_goes_but_evaluations(tmp_path: Path) -> None:
    other = "ffffff" if atomic.HOST != "ffffff" else "000000"
    leave(tmp_path, "step-00000004", host=other)
    (tmp_path / ".adapter.tmp-12-deadbeef").mkdir()  # of an older version
    kept = [
        leave(tmp_path, "eval-validation.json", host=other),
        leave(tmp_path, "a", pid=os.getpid(), token=atomic.TOKEN),
    ]
    atomic.sweep(tmp_path, everyone=True)
    assert names(tmp_path) == sorted(path.name for path in kept)


def test_what_may_not_be_removed_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, "a", pid=a_dead_process())

    def refuse(path: Path) -> None:
        raise PermissionError(1, "not yours")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", refuse)
        assert atomic.sweep(tmp_path) == []
        atomic_write_text(tmp_path / "a", "")
    assert (tmp_path / "a").exists()


def test_a_process_of_another_user_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "not yours")

    assert atomic.is_alive(os.getppid())
    assert not atomic.is_alive(a_dead_process())
    assert not atomic.is_alive(10**30)
    monkeypatch.setattr(atomic.os, "kill", refuse)
    assert atomic.is_alive(1)
