"""A disk that is really full: a small one in memory, where it may be mounted."""

import shutil
import subprocess

import pytest
from training_runs import TINY, everlong, tiny

from everlong.train import checkpoint, log

pytestmark = pytest.mark.slow
MEGABYTE = 1 << 20
ANEW = ("--mixer", "attention", *TINY, "--schedule", "constant")


@pytest.fixture
def disk(tmp_path):
    """Twelve megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={12 * MEGABYTE}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here: a full disk cannot be made")
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk, left):
    """Fills the disk up to so many bytes."""
    with (disk / "filler").open("ab") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))


def ends(*words):
    """The exit code of a command and its last line on standard error."""
    process = everlong(*words)
    told = process.communicate(timeout=300)[1]
    assert "Traceback" not in told
    return process.returncode, told.splitlines()[-1] if told else ""


def test_a_checkpoint_that_does_not_fit_stops_it_and_making_room_is_enough(prepared, disk):
    run, large = disk / "run", tiny(width=96, steps=100, checkpoint_every=2, keep=100)
    words = ("--mixer", "attention", "--schedule", "constant", *large)
    code, line = ends("train", "--data", prepared, "--out", run, *words)
    assert code == 2
    found = checkpoint.latest(run / "training")
    assert found.checkpoint.step >= 2
    assert found.damaged == ()
    assert line.startswith("everlong train: ")
    assert str(found.checkpoint.path) in line
    assert "could not be written" in line
    assert not list(run.rglob("*.tmp*"))
    assert shutil.disk_usage(disk).free > 100_000  # what did not fit is not in the way of others
    code, line = ends("train", "--out", run, "--resume", "--keep", "1")
    assert code == 2
    for path in sorted((run / "training").glob("step-*"))[:-1]:
        shutil.rmtree(path)
    code, _ = ends("train", "--out", run, "--resume", "--keep", "1", "--steps", "20")
    assert code == 0
    assert [row["step"] for row in log.read(run)] == list(range(1, 21))


@pytest.mark.parametrize("left", [0, 4096, 12_288])
def test_a_log_that_does_not_fit_stops_it(prepared, disk, left):
    run = disk / "run"
    assert ends("train", "--data", prepared, "--out", run, *ANEW)[0] == 0
    fill(disk, left)
    words = ("--steps", "2000", "--checkpoint-every", "2000")
    code, line = ends("train", "--out", run, "--resume", *words)
    assert code == 2
    assert "could not be written" in line or "no space left on device" in line
    assert (checkpoint.latest(run / "training").checkpoint.step, len(line.splitlines())) == (10, 1)
    (disk / "filler").unlink()
    code, _ = ends("train", "--out", run, "--resume", "--steps", "12", "--checkpoint-every", "4")
    assert code == 0
    assert [row["step"] for row in log.read(run)] == list(range(1, 13))


def test_data_that_does_not_fit_leaves_nothing(data, disk):
    fill(disk, MEGABYTE)
    for words in (
        ("prepare", data / "text", "--out", disk / "data"),
        ("train", "--data", data / "text", "--out", disk / "run", *ANEW),
    ):
        code, line = ends(*words)
        assert code == 2
        assert line.startswith(f"everlong {words[0]}: {disk}")
        assert line.endswith("no space left on device")
        assert shutil.disk_usage(disk).free > MEGABYTE * 0.9
