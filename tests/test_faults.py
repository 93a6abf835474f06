"""What goes wrong while reading: each fault is a typed error at its batch, and the next call reads on."""

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import Boundaries, Reader, described, read, windows, written

from mixloader import _core
from mixloader.errors import ShardError

PAGE = os.sysconf("SC_PAGESIZE")
MODES = pytest.mark.parametrize("mmap", [False, True], ids=["pread", "mmap"])


@pytest.fixture(autouse=True)
def _healed():
    yield
    _core._heal_io()


def tokens_from_one(count, dtype="u2"):
    """No zeros, so that a page that was cut shows."""
    return (np.arange(count) % 60_000 + 1).astype(dtype)


def run_script(folder, code):
    """Run Python in a process of its own that can import the tests' helpers."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}")
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=100)


# Files that cannot be opened


@MODES
def test_a_shard_that_is_no_file(tmp_path, mmap):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in [
        ("fifo", "fifo is not a regular file"),
        ("folder", "folder is not a regular file"),
        ("missing", "cannot open shard .*missing: No such file or directory; restore it, or correct its path"),
        ("fifo/below", "cannot open shard .*below: Not a directory; restore it"),
    ]:
        with pytest.raises(ShardError, match=reason):
            read([described(tmp_path / name, "u2", 11)], 10, mmap=mmap)
    with pytest.raises(ShardError, match="/dev/null is not a regular file"):
        read([described(Path("/dev/null"), "u2", 11)], 10, mmap=mmap)


@MODES
@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENFILE])
def test_a_shard_that_cannot_be_opened_this_time(tmp_path, mmap, call, number):
    tokens = tokens_from_one(101)
    reader = Reader([written(tmp_path / "a", tokens)], 100, mmap=mmap)
    _core._fail_io(call, error=number)
    with pytest.raises(ShardError, match=f"shard .*/a: {os.strerror(number)}"):
        reader.next()
    assert (reader.next().targets == tokens[1:]).all()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENODEV, errno.ENOMEM])
def test_a_shard_that_cannot_be_mapped(tmp_path, number):
    reader = Reader([written(tmp_path / "a", tokens_from_one(101))], 100, mmap=True)
    _core._fail_io("map", error=number)
    with pytest.raises(ShardError, match=f"cannot map shard .*/a: {os.strerror(number)}"):
        reader.next()
    reader.next()


@MODES
@given(cut=st.integers(0, 299))
def test_a_shard_truncated_at_any_byte_before_it_is_opened(tmp_path, mmap, cut):
    (tmp_path / "a").write_bytes(bytes(cut))
    with pytest.raises(ShardError, match=f"a has {cut} bytes, but its 150 tokens need 300; it was truncated"):
        read([described(tmp_path / "a", "u2", 150)], 149, mmap=mmap)


# Calls that fail while a batch is read


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_the_nth_read_that_fails_is_an_error_of_its_batch(tmp_path, threads, number):
    tokens = tokens_from_one(801)
    shard = written(tmp_path / "a", tokens)
    for nth in range(1, 9):
        reader = Reader([shard], 100, batch_size=2, threads=threads)
        _core._fail_io("read", nth=nth, error=number)
        for batch in range(4):
            if batch == (nth - 1) // 2:
                with pytest.raises(ShardError, match=rf"cannot read shard .*/a at byte \d+: {os.strerror(number)}"):
                    reader.next()
            assert (reader.next().inputs == windows(tokens, 100)[reader.order(), :-1]).all()
        reader.core.close()


@given(is_short=st.booleans(), nth=st.integers(1, 6), times=st.integers(1, 40), call=st.sampled_from(["read", "open"]))
def test_interrupted_and_short_reads_are_gone_on_with(tmp_path, is_short, nth, times, call):
    tokens = tokens_from_one(501)
    shard = written(tmp_path / "a", tokens)
    _core._fail_io(call, nth=nth, times=times, error=0 if is_short else errno.EINTR, is_short=is_short)
    assert (read([shard], 100).inputs == windows(tokens, 100)[:, :-1]).all()


def test_every_call_that_can_fail_fails_well(tmp_path):
    """Shards with extents, a table and checksums: whichever call fails, in whichever batch, it is a ShardError."""
    tokens = tokens_from_one(200)
    path = tmp_path / "a"
    path.write_bytes(b"".join(tokens[i : i + 20].tobytes() + bytes(6000) for i in range(0, 200, 20)))
    (tmp_path / "table").write_bytes(np.arange(0, 200, 30, dtype="<u8").tobytes())
    shard = described(path, "u2", 200, extent_tokens=20, extent_stride=6040, checksums=str(tmp_path / "sums"))
    shard |= {"documents": {"path": str(tmp_path / "table"), "offset": 0, "count": 7}}
    _core.write_checksums(str(path), shard["checksums"], 512)
    options = {"boundaries": Boundaries.INDEX, "mask_targets": True, "batch_size": 1}
    for call in "open", "stat", "read":
        for nth in itertools.count(1):
            reader = Reader([shard], 33, **options)
            _core._fail_io(call, nth=nth, error=errno.EIO)
            failed = 0
            for _ in range(6):
                try:
                    row = reader.next()
                except ShardError as error:
                    failed += os.strerror(errno.EIO) in str(error)
                    row = reader.next()
                assert (row.inputs == windows(tokens, 33)[reader.order(), :-1]).all()
            if _core._heal_io() < nth:
                break
            assert failed == 1
        assert nth > 3


def test_a_slow_disk_changes_nothing(tmp_path):
    tokens = tokens_from_one(801)
    reader = Reader([written(tmp_path / "a", tokens)], 100, batch_size=2, threads=3)
    _core._fail_io("read", nth=2, times=3, delay_ms=100)
    begin = time.monotonic()
    for _ in range(4):
        assert (reader.next().inputs == windows(tokens, 100)[reader.order(), :-1]).all()
    assert time.monotonic() - begin >= 0.1


def test_no_memory_in_a_thread_is_an_error_of_the_batch(tmp_path):
    code = """
import resource
from pathlib import Path
from reading import Reader, described
count = (1 << 26) + 1
with open("a", "wb") as file: file.truncate(2 * count)
import numpy as np
from mixloader import _core
reader = Reader([described(Path("a"), "u2", count)], count - 1, threads=1, shared=True, inputs=_core.TokenType.UINT16)
status = Path("/proc/self/status").read_text()
used = int(status.split("VmSize:")[1].split()[0]) << 10
# Enough for the buffers (128 MiB, and twice 512 and 256 of positions and documents), not for what the read goes to.
resource.setrlimit(resource.RLIMIT_AS, (used + (128 + 768 + 64 << 20), -1))
for _ in range(2):
    try:
        reader.next()
    except MemoryError:
        print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
reader.next()
"""
    result = run_script(tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["MemoryError"] * 2


# Files that change while they are open


@MODES
@pytest.mark.parametrize("dtype", ["u2", "u4"])
@given(cut=st.integers(0, 5 * 4096), at=st.integers(0, 3))
def test_a_shard_cut_while_it_is_open(tmp_path, mmap, dtype, cut, at):
    """At any byte: no row of it is silently wrong, and none kills the process."""
    tokens = tokens_from_one(5 * 4096 // np.dtype(dtype).itemsize + 40, dtype)
    shard = written(tmp_path / "a", tokens)
    reader = Reader([shard], 100, batch_size=1, mmap=mmap)
    rows = windows(tokens, 100)
    for _ in range(at + 1):
        assert (reader.next().targets == rows[reader.order(), 1:]).all()
    os.truncate(tmp_path / "a", cut)
    for _ in range(len(rows) - at - 1):
        row = reader.order()[0]
        if (row * 100 + 101) * tokens.itemsize <= cut:
            assert (reader.next().targets == rows[row, 1:]).all()
            continue
        for _ in range(2):
            with pytest.raises(ShardError, match=r"a ends at byte \d+, but its tokens reach byte \d+.*truncated after"):
                reader.next()
        return


@pytest.mark.parametrize("options", [{"boundaries": Boundaries.AFTER_EOT, "eot": 3}, {"vocab_size": 61_000}])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_map_is_guarded_in_every_thread_and_way_of_reading(tmp_path, options, threads):
    tokens = tokens_from_one(40 * PAGE)
    reader = Reader([written(tmp_path / "a", tokens)], 100, batch_size=4, mmap=True, threads=threads, **options)
    reader.next()
    os.truncate(tmp_path / "a", 0)
    for _ in range(20):
        with pytest.raises(ShardError, match="truncated after it was opened"):
            reader.next()
    reader.core.close()


def test_a_cut_file_that_is_restored_is_read_again(tmp_path):
    tokens = tokens_from_one(301)
    reader = Reader([written(tmp_path / "a", tokens)], 100, mmap=True)
    reader.next()
    os.truncate(tmp_path / "a", 10)
    with pytest.raises(ShardError, match="truncated after"):
        reader.next()
    written(tmp_path / "a", tokens)
    reader.next()


def test_a_mapped_file_that_was_replaced_or_removed_stays_as_it_was(tmp_path):
    tokens = np.zeros(301, "u4")  # zeros: their being there has to be proved
    reader = Reader([written(tmp_path / "a", tokens)], 100, mmap=True)
    reader.next()
    (tmp_path / "b").write_bytes(b"")
    os.replace(tmp_path / "b", tmp_path / "a")
    assert (reader.next().inputs == 0).all()
    (tmp_path / "a").unlink()
    assert (reader.next().inputs == 0).all()


CUT_OUTSIDE = """
import faulthandler, mmap, os
import numpy as np
from pathlib import Path
from reading import Reader, written
{before}
reader = Reader([written(Path("a"), np.ones(5001, "u2"))], 1000, mmap=True)
reader.next()
{after}
os.truncate("a", 100)
try:
    reader.next()
except OSError as error:
    print(error)
print("outside", flush=True)
with open("b", "wb") as file: file.write(bytes(10_000))
with open("b", "rb") as file: other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate("b", 0)
other[5000]
"""


@pytest.mark.parametrize(("before", "traceback"), [("", False), ("faulthandler.enable()", True)])
def test_faults_that_are_not_ours_go_to_the_handler_before(tmp_path, before, traceback):
    result = run_script(tmp_path, CUT_OUTSIDE.format(before=before, after=""))
    assert result.returncode == -signal.SIGBUS, result.stderr
    assert "truncated after it was opened" in result.stdout
    assert result.stdout.endswith("outside\n")
    assert ("Fatal Python error: Bus error" in result.stderr) == traceback


def test_a_handler_installed_later_does_not_take_ours_away(tmp_path):
    """Once the next shard has been mapped; and the two handlers do not call each other for ever."""
    after = """faulthandler.enable()
Reader([written(Path("c"), np.ones(5001, "u2"))], 1000, mmap=True).next()"""
    result = run_script(tmp_path, CUT_OUTSIDE.format(before="", after=after))
    assert result.returncode == -signal.SIGBUS, result.stderr
    assert "truncated after it was opened" in result.stdout
    assert "Fatal Python error: Bus error" in result.stderr


def test_a_file_overwritten_while_open_is_found_by_its_checksums(tmp_path):
    tokens = tokens_from_one(1001)
    for mmap in False, True:
        shard = written(tmp_path / "a", tokens, checksums=str(tmp_path / "sums"))
        _core.write_checksums(shard["path"], shard["checksums"], 512)
        reader = Reader([shard], 1000, mmap=mmap)
        reader.next()
        with (tmp_path / "a").open("r+b") as file:
            file.write((tokens + 1).tobytes())
        with pytest.raises(ShardError, match="damaged in block 0"):
            reader.next()


# Sidecars


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_sidecar_that_cannot_be_written_leaves_what_was_there(tmp_path, number):
    path, sums = tmp_path / "a", tmp_path / "sums"
    path.write_bytes(bytes(5000))
    _core.write_checksums(str(path), str(sums), 512)
    before = sums.read_bytes()
    path.write_bytes(bytes(6000))
    for nth in 1, 2:  # the write, the fsync
        _core._fail_io("write", nth=nth, error=number)
        with pytest.raises(ShardError, match=f"cannot write .*sums: {os.strerror(number)}"):
            _core.write_checksums(str(path), str(sums), 512)
        assert sums.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "sums"]
    _core._fail_io("write", is_short=True)
    _core.write_checksums(str(path), str(sums), 512)
    _core.verify(str(path), str(sums))


def test_a_sidecar_where_nothing_can_be_written(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(ShardError, match=r"cannot write .*missing/sums: No such file or directory"):
        _core.write_checksums(str(tmp_path / "a"), str(tmp_path / "missing" / "sums"), 512)


def test_no_descriptor_is_left_behind(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for mmap in False, True:
        reader = Reader([written(tmp_path / str(i), tokens_from_one(11)) for i in range(20)], 10, mmap=mmap)
        reader.next()
        assert count() == before + (0 if mmap else 20)
        reader.core.close()
        del reader
        with pytest.raises(ShardError):
            read([described(tmp_path, "u2", 11)], 10, mmap=mmap)
        assert count() == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
