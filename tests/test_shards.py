"""Shards: one pass over many files, mapped and reduced by any scheduler: here Dask, and the shell."""

import functools
import json
import subprocess
import sys
import zipfile

import dask
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

import ncfast
from ncfast import cli
from ncfast.shards import find_shards, is_sharded, measure_shards

import oracle

C, P = 4, 6
SIZES = (50, 1, 90, 35)


def whole():
    return oracle.clustered(C, P, sum(SIZES), 0.5, offset=10.0)


def write(path, features, labels):
    if path.suffix == ".npz":
        np.savez(path, features=features.numpy(), labels=labels.numpy())
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({"features": features, "labels": labels}, path)
    elif path.suffix == ".pt":
        torch.save({"features": features, "labels": labels}, path)
    else:
        column = pyarrow.array(list(features.numpy()))
        table = pyarrow.table({"id": range(len(labels)), "features": column, "labels": labels.numpy()})
        pyarrow.parquet.write_table(table, path, row_group_size=16)


@pytest.fixture(params=[".npz", ".safetensors", ".parquet", ".pt"])
def folder(request, tmp_path):
    """The data in four files of one format, and one that is no shard."""
    shards = tmp_path / "shards"
    shards.mkdir()
    features, labels = whole()
    parts = zip(features.split(SIZES), labels.split(SIZES), strict=True)
    for i, (h, y) in enumerate(parts):
        write(shards / f"part-{i}{request.param}", h.contiguous(), y.contiguous())
    (shards / "README.txt").write_text("no shard")
    return shards


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    torch.save({"weight": torch.randn(C, P), "bias": torch.randn(C)}, tmp_path / "head.pt")
    return tmp_path / "head.pt"


def assert_is_the_whole(report, weight=None):
    """The report of the same rows in memory; the order and size of pieces is all that differs."""
    features, labels = whole()
    stats = ncfast.ClassStatistics(C, P).update(features, labels)
    expected = ncfast.collapse(stats, weight).as_dict()
    for name, value in expected.items():
        if isinstance(value, float):
            oracle.assert_within(report[name], value, 1e-6 * abs(value) + 1e-9, name)
        else:
            assert report[name] == value, name


def test_a_folder_a_pattern_and_a_list(folder):
    suffix = find_shards([folder])[0].suffix
    for paths in ([folder], [f"{folder}/part-*"], sorted(folder.glob("part-*"), reverse=True)):
        shards = find_shards(paths)
        assert [shard.name for shard in shards] == [f"part-{i}{suffix}" for i in range(4)]
    stats = measure_shards(shards, C)
    assert_is_the_whole(ncfast.collapse(stats).as_dict())


def test_pieces_of_one_shard(folder, monkeypatch):
    monkeypatch.setattr("ncfast.shards._PIECE", 7 * P)
    monkeypatch.setattr("ncfast.shards._PARQUET_ROWS", 7)
    assert_is_the_whole(ncfast.collapse(measure_shards(find_shards([folder]), C)).as_dict())


def test_command_line(folder, classifier, tmp_path):
    out = tmp_path / "report.json"
    assert cli.main(["measure", str(folder), "--classifier", str(classifier), "--json", str(out)]) == 0
    assert_is_the_whole(json.loads(out.read_text()), torch.load(classifier)["weight"])


def test_map_and_reduce_by_the_shell(folder, tmp_path):
    """What a Slurm array does: every job takes a share, `ncfast merge` ends it. One is a real process."""
    states = [str(tmp_path / f"{i}.state") for i in (1, 2, 3)]
    for i, state in enumerate(states, 1):
        command = [
            "measure",
            str(folder),
            "--shards",
            f"{i}/3",
            "--num-classes",
            str(C),
            "--save-state",
            state,
        ]
        if i == 1:
            subprocess.run([sys.executable, "-m", "ncfast", *command], check=True, timeout=120)
        else:
            assert cli.main(command) == 0
    out, merged = tmp_path / "report.json", tmp_path / "all.state"
    assert cli.main(["merge", *states, "--json", str(out), "--save-state", str(merged)]) == 0
    assert_is_the_whole(json.loads(out.read_text()))
    assert ncfast.ClassStatistics.load(merged).num_samples == sum(SIZES)


def test_a_saved_state_does_not_replace_the_report(folder, tmp_path):
    state, out = tmp_path / "all.state", tmp_path / "report.json"
    command = ["measure", str(folder), "--num-classes", str(C), "--save-state", str(state)]
    assert cli.main([*command, "--json", str(out)]) == 0
    assert_is_the_whole(json.loads(out.read_text()))
    assert ncfast.ClassStatistics.load(state).num_samples == sum(SIZES)


def test_map_and_reduce_by_dask(tmp_path):
    """One task per shard; states travel by pickle between the workers' processes and are merged."""
    features, labels = whole()
    for i, (h, y) in enumerate(zip(features.split(SIZES), labels.split(SIZES), strict=True)):
        write(tmp_path / f"part-{i}.npz", h, y)
    load = dask.delayed(functools.partial(measure_shards, num_classes=C))
    states = [load([shard]) for shard in find_shards([tmp_path])]
    while len(states) > 1:
        pairs = [states[i : i + 2] for i in range(0, len(states), 2)]
        states = [dask.delayed(ncfast.ClassStatistics.merge)(*pair) for pair in pairs]
    with dask.config.set({"multiprocessing.context": "spawn"}):
        (stats,) = dask.compute(states[0], scheduler="processes", num_workers=2)
    assert_is_the_whole(ncfast.collapse(stats).as_dict())


def test_errors_name_the_file_and_the_row(folder):
    with pytest.raises(ValueError, match=r"part-0\..*label \d in row \d+ is outside \[0, 2\)"):
        measure_shards(find_shards([folder]), 2)
    with pytest.raises(ValueError, match=r"part-0\..* is named 'targets'; there are: .*labels"):
        measure_shards(find_shards([folder]), C, labels="targets")
    suffix = find_shards([folder])[0].suffix
    features, labels = oracle.clustered(C, P + 1, 10, 0.5)
    write(folder / f"part-9{suffix}", features, labels)
    with pytest.raises(ValueError, match=r"part-9\..*\[N, 6\], got \[10, 7\]"):
        measure_shards(find_shards([folder]), C)


def test_rows_are_numbered_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("ncfast.shards._PIECE", 4 * P)
    features, labels = oracle.clustered(C, P, 20, 0.5)
    features[13, 2] = torch.nan
    write(tmp_path / "bad.npz", features, labels)
    with pytest.raises(ValueError, match=r"bad\.npz: .*row 13"):
        measure_shards([tmp_path / "bad.npz"], C)
    assert measure_shards([tmp_path / "bad.npz"], C, nonfinite="skip").num_skipped == 1


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.array([[1.0, 2.0], [3.0]]), "one length"),
        (pyarrow.array([[1.0, 2.0, 3.0], [3.0]]), "one length"),
        (pyarrow.array([[1.0, None], [3.0, 4.0]]), "no nulls"),
        (pyarrow.array([[1.0, 2.0], None]), "no nulls"),
        (pyarrow.array([1.0, 2.0]), "must hold lists"),
        (pyarrow.array([["a"], ["b"]]), "must hold lists of numbers"),
        (pyarrow.array([{"a": 1.0}, {"a": 2.0}]), "must hold lists of numbers"),
        (pyarrow.array([[("a", 1.0)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.float64())), "must hold"),
    ],
)
def test_parquet_columns_that_are_no_features(tmp_path, column, words):
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"features": column, "labels": [0, 1]}), path)
    with pytest.raises((ValueError, TypeError), match=words):
        measure_shards([path], 2)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet: is no \.parquet file"):
        measure_shards([path], 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-classes", "4", "--shards", "0/3"], "--shards must be I/N"),
        (["--num-classes", "4", "--shards", "4/3"], "--shards must be I/N"),
        (["--num-classes", "4", "--shards", "7/9"], "share 7/9 of the shards is empty"),
        ([], "--num-classes or --classifier"),
        (["--num-classes", "4", "--test-features", "t"], "nothing to measure on test data"),
        (["--num-classes", "4", "--weight", "W"], "--classifier, which was not given"),
        (["--num-classes", "-1"], "num_classes and dim must be at least 1, got -1"),
        (["--num-classes", "4", "--json", "-", "--csv", "-"], "cannot both go to standard output"),
    ],
)
def test_command_line_errors(folder, capsys, arguments, words):
    assert cli.main(["measure", str(folder), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_bias_that_was_asked_for_must_be_there(folder, classifier, capsys):
    assert cli.main(["measure", str(folder), "--classifier", str(classifier), "--bias", "b"]) == 2
    assert "no array is named 'b'; there are: weight, bias" in capsys.readouterr().err


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path):
    path = tmp_path / "run[1].npz"
    write(path, *whole())
    assert not is_sharded(path)
    assert find_shards([path]) == [path]
    assert cli.main(["measure", str(path), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["num_samples"] == sum(SIZES)


def test_an_empty_shard_among_others(folder):
    suffix = find_shards([folder])[0].suffix
    features, labels = whole()
    if suffix == ".parquet":
        kinds = pyarrow.list_(pyarrow.float32()), pyarrow.int64()
        columns = [pyarrow.array([], kind) for kind in kinds]
        table = pyarrow.table(columns, names=["features", "labels"])
        pyarrow.parquet.write_table(table, folder / "part-.parquet")
    else:
        write(folder / f"part-{suffix}", features[:0], labels[:0])
    shards = find_shards([folder])
    assert shards[0].stem == "part-"
    assert_is_the_whole(ncfast.collapse(measure_shards(shards, C)).as_dict())


def test_progress_bar(folder, capsys):
    measure_shards(find_shards([folder]), C, progress=True)
    err = capsys.readouterr().err
    assert "shards: 100%" in err
    assert "4/4" in err
    measure_shards(find_shards([folder]), C)
    assert capsys.readouterr().err == ""


PEAK = """
import resource, sys
from ncfast.shards import measure_shards
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
measure_shards(sys.argv[1:4], 10)
before = peak()
measure_shards(sys.argv[1:], 10)
print(peak() - before)
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_memory_is_constant_in_the_number_of_shards(tmp_path, suffix):
    """17 shards more, 8 MiB each, may not add two of them to what three took at their peak."""
    features, labels = oracle.clustered(10, 256, 8192, 0.5)
    for i in range(20):
        write(tmp_path / f"part-{i:02}{suffix}", features, labels)
    shards = [str(path) for path in find_shards([tmp_path])]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *shards], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) <= 2 * features.nbytes


def test_nothing_to_read(tmp_path, capsys):
    assert cli.main(["measure", str(tmp_path), "--num-classes", "2"]) == 2
    assert "has no shards" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown format"):
        find_shards([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match="no shards to measure"):
        measure_shards([], 2)


def test_merge_refuses_what_is_no_state(tmp_path, capsys):
    (tmp_path / "foreign.state").write_bytes(b"something else")
    assert cli.main(["merge", str(tmp_path / "foreign.state")]) == 2
    assert "is not a ClassStatistics file" in capsys.readouterr().err
    for name, dim in (("a.state", 3), ("b.state", 4)):
        ncfast.ClassStatistics(2, dim).update(torch.randn(5, dim), torch.arange(5) % 2).save(tmp_path / name)
    assert cli.main(["merge", str(tmp_path / "a.state"), str(tmp_path / "b.state")]) == 2
    assert "b.state: cannot merge" in capsys.readouterr().err


def test_what_else_an_npz_holds_is_left_alone(tmp_path):
    h, y = oracle.clustered(C, 5, 8, 1.0)
    write(tmp_path / "part.npz", h, y)
    with zipfile.ZipFile(tmp_path / "part.npz", "a") as archive:
        archive.writestr("readme.txt", "what this is")
    assert measure_shards([tmp_path / "part.npz"], C).num_samples == len(y)
