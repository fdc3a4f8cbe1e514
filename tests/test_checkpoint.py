"""States in files: killed runs resume bit for bit; what is cut short, damaged or foreign is refused."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ncfast

from oracle import clustered

REFUSED = r"part\.state is (not a ClassStatistics file|damaged or was cut short)"
WORKER = Path(__file__).with_name("resume_worker.py")


def start(folder):
    command = [sys.executable, str(WORKER), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    """kill -9 within the first of three epochs, and at the very end of the second."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    with start(whole) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    for kill_after in (3, 8):
        with start(torn) as process:
            for line in process.stdout:
                if line == f"done {kill_after}\n":
                    process.kill()
        assert process.returncode == -9
        assert not (torn / "history.json").exists()
    with start(torn) as process:
        out, _ = process.communicate(timeout=120)
    assert int(out.split()[1]) >= 8  # it did resume
    histories = [json.loads((folder / "history.json").read_text()) for folder in (whole, torn)]
    assert histories[0] == histories[1]
    assert [record["epoch"] for record in histories[0]] == [1, 2, 3]


def test_interrupted_after_every_batch_gives_the_same_bits():
    features, labels = clustered(7, 20, 300, 0.1, offset=50.0)
    whole, torn = ncfast.ClassStatistics(7, 20), ncfast.ClassStatistics(7, 20)
    for h, y in zip(features.split(32), labels.split(32), strict=True):
        whole.update(h, y)
        torn.update(h, y)
        file = io.BytesIO()
        torch.save(torn.state_dict(), file)
        file.seek(0)
        torn = ncfast.ClassStatistics(7, 20)
        torn.load_state_dict(torch.load(file, weights_only=True))
    assert ncfast.collapse(torn) == ncfast.collapse(whole)
    for name in ("counts", "shift", "sums", "sumsq", "scatter"):
        assert torch.equal(getattr(torn, name), getattr(whole, name))


@pytest.fixture
def saved(tmp_path):
    features, labels = clustered(3, 4, 50, 0.1)
    stats = ncfast.ClassStatistics(3, 4, nonfinite="skip").update(features, labels)
    path = tmp_path / "part.state"
    stats.save(path)
    return stats, path


@pytest.mark.parametrize("scatter", [True, False])
def test_file_round_trip(tmp_path, scatter):
    features, labels = clustered(3, 4, 50, 0.1)
    stats = ncfast.ClassStatistics(3, 4, scatter=scatter, nonfinite="skip").update(features, labels)
    stats._skipped += 2
    path = tmp_path / "part.state"
    stats.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = ncfast.ClassStatistics.load(path, precision="medium", nonfinite="skip")
    for name in ("counts", "shift", "sums", "sumsq"):
        assert torch.equal(getattr(loaded, name), getattr(stats, name))
    assert (loaded.scatter is None) == (not scatter)
    assert loaded.num_skipped == 2
    assert loaded.precision == "medium"
    loaded.update(features, labels).merge(stats)
    assert loaded.num_samples == 150


def test_a_state_saved_from_a_gpu_is_read_without_one(saved, monkeypatch):
    stats, path = saved
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")  # what a GPU's tensors say
    stats.save(path)
    monkeypatch.undo()
    loaded = ncfast.ClassStatistics.load(path)
    assert torch.equal(loaded.sums, stats.sums)
    assert loaded.sums.device.type == "cpu"


def test_a_state_of_equal_samples_moved_to_their_mean_can_be_saved(tmp_path):
    """Moving Σ‖h − k‖² to the mean cancels it: rounding must leave no square below zero."""
    generator = torch.Generator().manual_seed(0)
    stats = ncfast.ClassStatistics(20, 3, shift=torch.randn(20, 3, generator=generator) * 1e3)
    features = torch.randn(20, 3, generator=generator).repeat(7, 1)
    stats.update(features, torch.arange(20).repeat(7))
    assert (stats.sumsq >= 0).all()
    stats.save(tmp_path / "a.state")
    assert ncfast.ClassStatistics.load(tmp_path / "a.state").num_samples == 140


def test_a_file_cut_short_anywhere_is_refused(saved):
    _, path = saved
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=REFUSED):
            ncfast.ClassStatistics.load(path)


def test_a_flipped_bit_anywhere_is_refused(saved):
    _, path = saved
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=REFUSED):
            ncfast.ClassStatistics.load(path)


def test_foreign_files_are_refused(saved, tmp_path):
    stats, path = saved
    torch.save(stats.state_dict(), path)  # a checkpoint, but not what `save` writes
    with pytest.raises(ValueError, match=r"part\.state is not a ClassStatistics file"):
        ncfast.ClassStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        ncfast.ClassStatistics.load(tmp_path / "missing")


def test_a_failed_save_leaves_the_old_file(saved):
    stats, path = saved
    before = path.read_bytes()
    stats._refused += 1
    with pytest.raises(ValueError, match="1 rows were left out"):
        stats.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("counts", torch.tensor([-1, 0, 0]), "counts holds a number that no samples can leave"),
        ("sums", torch.full((3, 4), torch.nan, dtype=torch.float64), "sums holds a number"),
        ("sumsq", torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), "sumsq holds a number"),
        ("scatter", torch.full((4, 4), torch.inf, dtype=torch.float64), "scatter holds a number"),
        ("shift", torch.full((3, 4), torch.nan), "has no shift"),
        ("shift", torch.zeros(3, 4, dtype=torch.float16), "shift must be float32 or float64"),
        ("num_skipped", -1, "num_skipped must be a count"),
        ("num_skipped", "1", "num_skipped must be a count"),
    ],
)
def test_values_that_no_samples_can_leave_are_refused(saved, entry, value, words):
    stats, _ = saved
    state = stats.state_dict()
    other = ncfast.ClassStatistics(3, 4)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state | {entry: value})
    assert other.num_samples == 0


@pytest.mark.parametrize("content", [{"weights": torch.zeros(2)}, [1, 2], {"sums": torch.zeros(2, 3)}])
def test_a_whole_file_of_something_else_is_refused(content, tmp_path):
    """The magic line and the checksum agree; what they guard is no state."""
    path = tmp_path / "part.state"
    ncfast.ClassStatistics(2, 3).save(path)
    magic = path.read_bytes().split(b"\n")[0] + b"\n"
    archive = io.BytesIO()
    torch.save(content, archive)
    path.write_bytes(magic + hashlib.sha256(archive.getvalue()).digest() + archive.getvalue())
    with pytest.raises(ValueError, match="is not a ClassStatistics file"):
        ncfast.ClassStatistics.load(path)
