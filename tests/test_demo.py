"""The demo, with few epochs: what it writes, what it says, and that it leaves no trace."""

import csv
import json

import pytest
import torch
from matplotlib.image import imread

from ncfast import cli, demo
from ncfast.history import zero_error_epochs


@pytest.fixture
def quick(tmp_path, capsys):
    records = demo.run_demo(tmp_path / "out", quick=True, epochs=30, seed=0)
    return records, tmp_path / "out", capsys.readouterr().out


def test_it_trains_measures_and_writes(quick):
    records, folder, out = quick
    assert [record["epoch"] for record in records] == list(range(1, 31))
    assert json.loads((folder / "collapse.json").read_text()) == records
    with open(folder / "collapse.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: "" if v is None else str(v) for name, v in record.items()} for record in records]
    assert imread(folder / "collapse.png").ndim == 3
    first, _ = zero_error_epochs(records)
    assert first is not None
    assert f"first epoch of zero training error: {first};" in out
    last = records[-1]
    assert f"{last['nc1']:.2e}" in out
    assert last["nc1"] < records[0]["nc1"] / 3  # it learns, and collapse is under way
    assert last["test_accuracy"] > 0.9
    assert {record["nc4_data"] for record in records} == {"test"}


def test_the_same_seed_gives_the_same_run(quick, tmp_path):
    records, _, _ = quick
    again = demo.run_demo(tmp_path / "again", quick=True, epochs=3, seed=0)
    other = demo.run_demo(tmp_path / "other", quick=True, epochs=3, seed=1)
    # The schedule depends on the number of epochs, but not within the first of them.
    assert again[0] == records[0]
    assert other[0] != records[0]


def test_it_leaves_threads_and_random_numbers_alone(tmp_path):
    torch.manual_seed(3)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert cli.main(["demo", "--quick", "--epochs", "1", "--output", str(tmp_path / "a" / "b")]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "collapse.csv",
        "collapse.json",
        "collapse.png",
    ]


def test_the_split_is_stratified():
    (train, y), (test, y_test) = demo._load(quick=True, seed=0)
    assert len(train) + len(test) == 1797
    assert train.min() == 0.0
    assert train.max() == 1.0
    for c in range(10):
        both = int((y == c).sum()) + int((y_test == c).sum())
        assert abs(int((y_test == c).sum()) - both / 5) <= 1


def test_without_zero_error_it_says_so(tmp_path, capsys):
    records = demo.run_demo(tmp_path, quick=True, epochs=1)
    assert zero_error_epochs(records) == (None, None)
    assert "no epoch of zero training error in 1" in capsys.readouterr().out


def test_epochs_below_one(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--epochs", "0", "--output", str(tmp_path)]) == 2
    assert "epochs must be at least 1" in capsys.readouterr().err
