"""The command line: every format, every error, in one line and with its exit code."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch

import ncfast
from ncfast import cli
from ncfast.files import read_arrays
from ncfast.ops import dispatch

import oracle


@pytest.fixture
def arrays():
    features, labels = oracle.clustered(3, 5, 60, 2.0)
    return {"features": features, "labels": labels, "weight": torch.randn(3, 5), "bias": torch.randn(3)}


@pytest.fixture(params=["npz", "compressed npz", "npy", "pt", "safetensors"])
def files(request, arrays, tmp_path):
    """The arrays in files of one format."""
    plain = {name: tensor.numpy() for name, tensor in arrays.items()}
    if request.param == "npz":
        np.savez(tmp_path / "all.npz", **plain)
    elif request.param == "compressed npz":
        np.savez_compressed(tmp_path / "all.npz", **plain)
    elif request.param == "npy":
        for name, array in plain.items():
            np.save(tmp_path / f"{name}.npy", array)
    elif request.param == "pt":
        torch.save(arrays, tmp_path / "all.pt")
    else:
        safetensors.torch.save_file(arrays, tmp_path / "all.safetensors")
    return sorted(map(str, tmp_path.iterdir()))


def run(capsys, *argv):
    """Exit code, standard output and standard error of one command."""
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


def test_every_format_gives_the_report(capsys, files, arrays):
    code, out, err = run(capsys, "measure", *files, "--json", "-")
    assert (code, err) == (0, "")
    assert json.loads(out) == ncfast.measure(**arrays).as_dict()


def test_arrays_are_read_as_they_were_saved(files, arrays):
    read = read_arrays(files)
    assert set(read) == set(arrays)
    for name, array in read.items():
        array = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array
        assert array.dtype == arrays[name].dtype
        assert torch.equal(array, arrays[name])


def test_what_can_be_mapped_is(tmp_path):
    big, odd = np.random.default_rng(0).random((100, 7)), np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "a.npz", big=big, odd=odd, empty=np.empty((0, 3)), one=np.float64(3.0))
    np.save(tmp_path / "alone.npy", big)
    read = read_arrays([tmp_path / "a.npz", tmp_path / "alone.npy"])
    assert isinstance(read["big"], np.memmap)
    assert isinstance(read["alone"], np.memmap)
    for name, array in {"big": big, "odd": odd, "empty": np.empty((0, 3)), "one": 3.0, "alone": big}.items():
        assert np.array_equal(read[name], array), name


def test_the_table_and_the_files(capsys, arrays, tmp_path):
    torch.save(arrays, tmp_path / "all.pt")
    json_path, csv_path = tmp_path / "report.json", tmp_path / "report.csv"
    code, out, err = run(capsys, "measure", tmp_path / "all.pt", "--json", json_path, "--csv", csv_path)
    report = ncfast.measure(**arrays)
    assert (code, err) == (0, "")
    for name in report.as_dict():
        assert name in out
    assert f"{report.nc1:.6g}" in out
    assert json.loads(json_path.read_text()) == report.as_dict()
    header, row = csv_path.read_text().splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert list(cells) == list(report.as_dict())
    assert float(cells["nc1"]) == report.nc1
    assert cells["test_accuracy"] == ""


def test_names_and_options(capsys, tmp_path):
    features, labels = oracle.clustered(3, 5, 60, 2.0)
    labels[5] = 9
    features[7, 0] = torch.nan
    weight = torch.randn(4, 5)
    tensors = {"h": features, "y": labels, "W": weight, "h2": features[10:20], "y2": labels[10:20]}
    torch.save(tensors, tmp_path / "t.pt")
    argv = ["measure", tmp_path / "t.pt", "--features", "h", "--labels", "y", "--weight", "W", "--json", "-"]
    argv += ["--test-features", "h2", "--test-labels", "y2", "--ignore-index", "9", "--nonfinite", "skip"]
    argv += ["--global-mean", "classes", "--precision", "highest", "--num-classes", "4"]
    code, out, _ = run(capsys, *argv)
    expected = ncfast.measure(
        features,
        labels,
        weight,
        test=(features[10:20], labels[10:20]),
        ignore_index=9,
        nonfinite="skip",
        global_mean="classes",
        precision="highest",
    )
    assert code == 0
    assert json.loads(out) == expected.as_dict()


def bad_files(folder):
    """(what is wrong, arguments, words of the message)."""
    features, labels = torch.randn(6, 2), torch.arange(6) % 2
    torch.save({"features": features, "labels": labels}, folder / "good.pt")
    torch.save({"features": features}, folder / "half.pt")
    torch.save({"features": features * torch.nan, "labels": labels}, folder / "nan.pt")
    torch.save({"features": features, "labels": labels + 5, "weight": torch.randn(2, 2)}, folder / "label.pt")
    torch.save({"features": features.long(), "labels": labels}, folder / "dtype.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"features": features, "labels": labels, "test_features": features}, folder / "test.pt")
    (folder / "text.txt").write_text("features")
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    for suffix in ("npz", "npy", "pt", "safetensors"):
        (folder / f"damaged.{suffix}").write_bytes(b"PK\x03\x04 not what it says")
        (folder / f"empty.{suffix}").write_bytes(b"")
        yield f"damaged {suffix}", [f"damaged.{suffix}"], f"damaged.{suffix}"
        yield f"empty {suffix}", [f"empty.{suffix}"], f"empty.{suffix}"
    whole = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    np.savez_compressed(folder / "deflate.npz", features=np.arange(50_000.0).reshape(-1, 2))
    raw = (folder / "deflate.npz").read_bytes()
    (folder / "deflate.npz").write_bytes(raw[:2000] + b"\xff" * 2000 + raw[4000:])
    yield "compressed bytes changed", ["deflate.npz"], "deflate.npz is no .npz file of numbers, or is damaged"
    np.save(folder / "header.npy", features.numpy())
    raw = (folder / "header.npy").read_bytes()
    (folder / "header.npy").write_bytes(raw.replace(b"}", b"(", 1))
    yield "a header that is no Python", ["header.npy"], "header.npy is no .npy file of numbers, or is damaged"
    yield "cut short", ["cut.pt"], "cut.pt is no .pt file"
    yield "missing", ["missing.npz"], "No such file"
    yield "a folder", ["."], "shards need --num-classes or --classifier"
    yield "unknown format", ["text.txt"], "text.txt: unknown format; expected one of .npz"
    yield "no labels", ["half.pt"], "no array is named 'labels'; there are: features"
    yield "wrong name", ["good.pt", "--features", "h"], "no array is named 'h'; there are: features, labels"
    yield "twice", ["good.pt", "half.pt"], "'features' was already read"
    yield "NaN", ["nan.pt"], "NaN or an infinity in row 0"
    yield "label", ["label.pt"], "label 5 in row 0 is outside [0, 2)"
    yield "dtype", ["dtype.pt"], "features must be float32"
    yield "no dictionary", ["list.pt"], "must hold a tensor or a dictionary"
    yield "half a test set", ["test.pt"], "needed together"
    yield "pickled objects", ["objects.npy"], "objects.npy is no .npy file of numbers"
    yield "two reports", ["good.pt", "--json", "-", "--csv", "-"], "cannot both go to standard output"
    yield "classes", ["good.pt", "--num-classes", "-1"], "num_classes must be at least 1, got -1"
    yield "unwritable", ["good.pt", "--json", "no/such/folder.json"], "No such file"


def test_errors_are_one_line_and_code_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, argv, words in bad_files(tmp_path):
        code, _, err = run(capsys, "measure", *argv)
        assert code == 2, what
        assert err.startswith("ncfast: error: "), what
        assert err.count("\n") == 1, what
        assert words in err, what


@pytest.mark.parametrize("argv", [[], ["measure"], ["collapse"], ["measure", "x.pt", "--precision", "exact"]])
def test_usage_errors_are_code_2(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("ncfast: error: ")
    assert err.count("\n") == 1


def test_ctrl_c_is_code_130(monkeypatch, arrays, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    torch.save(arrays, tmp_path / "all.pt")
    monkeypatch.setattr(ncfast, "measure", interrupted)
    assert cli.main(["measure", str(tmp_path / "all.pt")]) == 130


def test_missing_optional_packages_are_named(monkeypatch, capsys, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    safetensors.torch.save_file({"features": torch.randn(2, 2)}, tmp_path / "a.safetensors")
    for package, argv in [
        ("rich", ["info"]),
        ("safetensors", ["measure", str(tmp_path / "a.safetensors")]),
        ("matplotlib", ["demo", "--output", str(tmp_path / "out")]),
        ("sklearn", ["demo", "--output", str(tmp_path / "out")]),
    ]:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, p=package: None if name == p else found(name, *rest),
        )
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert package in err
        assert "pip install" in err


def test_info(capsys):
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    assert ncfast.__version__ in out
    assert torch.__version__ in out
    for operation in cli.OPERATIONS:
        assert operation in out
    assert out.count("runs") == len(cli.OPERATIONS)


def test_info_names_the_instruction_set(capsys, monkeypatch):
    extension = types.SimpleNamespace(
        isas=lambda: [("portable", True), ("amx", False)], isa=lambda _: "portable"
    )
    monkeypatch.setitem(sys.modules, "ncfast._cpu", extension)
    monkeypatch.setattr(dispatch, "unavailable", lambda _: None)
    monkeypatch.setattr(dispatch, "explain", lambda *_, **__: [("cpu", "runs"), ("reference", "available")])
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "portable yes, amx no" in out
    assert out.count("runs on portable") == len(cli.OPERATIONS)


def test_a_closed_pipe_is_silent(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.eye(4, dtype="f4"), labels=np.arange(4) % 2)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ncfast", "measure", str(tmp_path / "a.npz"), "--json", "-"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("argv", [["--help"], ["measure", "a.npz"], ["measure", "Σ.npz"]])
def test_a_terminal_without_unicode(tmp_path, argv):
    np.savez(tmp_path / "a.npz", features=np.eye(4, dtype="f4"), labels=np.arange(4) % 2)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ncfast", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if "Σ.npz" in argv:
        assert (done.returncode, done.stderr) == (2, "ncfast: error: ?.npz: No such file or directory\n")
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert "?" in done.stdout


def test_as_a_module_and_as_a_script(tmp_path):
    """Both spellings in a subprocess, from another folder, errors included."""
    np.savez(tmp_path / "a.npz", features=np.eye(4, dtype="f4"), labels=np.arange(4) % 2)
    script = os.path.join(os.path.dirname(sys.executable), "ncfast")
    # A checkout on PYTHONPATH, uninstalled, has no script.
    for command in [[sys.executable, "-m", "ncfast"]] + ([[script]] if os.path.exists(script) else []):
        done = subprocess.run(
            [*command, "measure", "a.npz", "--csv", "-"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("nc1,")
        failed = subprocess.run(
            [*command, "measure", "b.npz"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert failed.returncode == 2
        assert "Traceback" not in failed.stderr
        assert "b.npz" in failed.stderr
