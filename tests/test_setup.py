"""setup.py: when ncfast._cuda is built, for what, and what if it cannot be. A stand-in plays nvcc."""

import os
import pathlib
import runpy
import shutil
import stat
import subprocess
import sys
import warnings

import pytest

setuptools = pytest.importorskip("setuptools")
pytest.importorskip("pybind11")
ROOT = pathlib.Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("there is no setup.py beside the tests", allow_module_level=True)

NVCC = """#!{python}
import pathlib, sys
if {broken}:
    sys.exit(3)
elif "--list-gpu-arch" in sys.argv and {old}:
    print("compute_35 compute_75".replace(" ", "\\n"))
elif "--list-gpu-arch" in sys.argv:
    print("compute_75 compute_80 compute_90 compute_100 compute_120".replace(" ", "\\n"))
elif {works}:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv[1:]))
else:
    sys.exit(2)
"""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Run setup.py with an nvcc that works, fails, is broken, old or absent; return what it would set up.

    In a source tree of links, so that building in place changes nothing here.
    """
    tree = tmp_path / "tree"
    (tree / "ncfast").mkdir(parents=True)
    for name in ("csrc", "setup.py"):
        (tree / name).symlink_to(ROOT / name)

    def run(nvcc, **environment):
        for name in ("NCFAST_CUDA", "NCFAST_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if nvcc != "absent":
            tool = tmp_path / "nvcc"
            tool.write_text(
                NVCC.format(
                    python=sys.executable, works=nvcc == "works", broken=nvcc == "broken", old=nvcc == "old"
                )
            )
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.chdir(tree)
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
        runpy.run_path("setup.py")
        return given

    return run


def build(given, folder, inplace=False):
    """Build ncfast._cuda alone; return what the stand-in wrote, the command's arguments, or None."""
    extensions = [extension for extension in given["ext_modules"] if extension.name == "ncfast._cuda"]
    distribution = setuptools.Distribution({"name": "ncfast", "ext_modules": extensions})
    command = given["cmdclass"]["build_ext"](distribution)
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.inplace = inplace
    command.ensure_finalized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optional extension that fails is warned about
        command.run()
    built = list((folder / "lib").rglob("_cuda*"))
    return built[0].read_text().split() if built else None


def names(given):
    return [extension.name for extension in given["ext_modules"]]


@pytest.mark.parametrize(
    ("nvcc", "environment", "has_cuda"),
    [
        ("works", {}, True),
        ("absent", {}, False),
        ("works", {"NCFAST_CUDA": "0"}, False),
        ("works", {"NCFAST_CUDA": "1"}, True),
        ("absent", {"NCFAST_CUDA": "1"}, True),  # so that building it can fail
        ("works", {"NCFAST_CUDA": ""}, True),  # set but empty: as if unset
    ],
)
def test_what_is_built(configure, nvcc, environment, has_cuda):
    given = configure(nvcc, **environment)
    assert names(given) == ["ncfast._cpu", "ncfast._cuda"][: 1 + has_cuda]


def test_default_architectures(configure, tmp_path):
    arguments = build(configure("works"), tmp_path)
    codes = [argument for argument in arguments if argument.startswith("-gencode")]
    assert codes == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    sources = {argument for argument in arguments if argument.endswith((".cu", ".cpp"))}
    assert sources == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.c*[up]")}


@pytest.mark.parametrize("listed", ["80 120", "80,120"])
def test_chosen_architectures(configure, tmp_path, listed):
    arguments = build(configure("works", NCFAST_CUDA_ARCHS=listed), tmp_path)
    codes = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("-gencode")]
    assert codes == [
        "arch=compute_80,code=sm_80",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(("listed", "named"), [("75 90", "75"), ("90 sm_80", "sm_80"), ("90a 70", "70")])
def test_architectures_that_cannot_be_are_refused(configure, tmp_path, listed, named):
    """Older ones have no cp.async: leaving the extension out would hide that."""
    with pytest.raises(ValueError, match=f"from 80 on, got '{named}'"):
        build(configure("works", NCFAST_CUDA_ARCHS=listed), tmp_path)


@pytest.mark.parametrize("nvcc", ["fails", "broken", "old"])
def test_a_compiler_that_fails_leaves_it_out(configure, tmp_path, nvcc):
    assert build(configure(nvcc), tmp_path) is None


def test_sources_that_are_missing_leave_it_out(configure, tmp_path):
    given = configure("works")
    os.unlink("csrc")
    assert build(given, tmp_path) is None


def test_it_is_built_again_when_the_command_changes(configure, tmp_path):
    def built(mark, **environment):
        arguments = build(configure("works", **environment), tmp_path)
        (target,) = (tmp_path / "lib").rglob("_cuda*")
        found = mark in arguments
        target.write_text(target.read_text() + f" {mark}")  # gone if it is built again
        return found, [argument for argument in arguments if argument.startswith("-gencode")]

    assert not built("first")[0]
    assert built("first")[0]
    again, codes = built("first", NCFAST_CUDA_ARCHS="90")
    assert not again
    assert codes[0].endswith("sm_90")
    assert built("first", NCFAST_CUDA_ARCHS="90")[0]


@pytest.mark.parametrize(
    ("nvcc", "environment"), [("works", {"NCFAST_CUDA": "0"}), ("absent", {}), ("fails", {})]
)
def test_an_older_build_does_not_stay(configure, tmp_path, nvcc, environment):
    """Neither where a wheel would take it from nor beside the sources."""
    assert build(configure("works"), tmp_path, inplace=True)
    assert list(pathlib.Path("ncfast").glob("_cuda*"))
    environment = {"NCFAST_CUDA_ARCHS": "90", **environment}
    (tmp_path / "nvcc").unlink()
    assert build(configure(nvcc, **environment), tmp_path, inplace=True) is None
    assert not list(pathlib.Path("ncfast").glob("_cuda*"))


def test_an_sdist_has_all_sources(tmp_path):
    """Made where CUDA is left out, it still has what another machine builds ncfast._cuda from."""
    for folder in ("csrc", "ncfast", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"],
        cwd=tmp_path,
        env=os.environ | {"NCFAST_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    packed = set((tmp_path / "ncfast.egg-info/SOURCES.txt").read_text().split())
    assert "csrc/cuda/class_moments.cu" in files
    assert files <= packed


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [("fails", "exit status 2"), ("broken", "exit status 3"), ("absent", "there is no nvcc")],
)
def test_what_was_insisted_on_fails_loudly(configure, tmp_path, nvcc, message):
    given = configure(nvcc, NCFAST_CUDA="1")
    with pytest.raises(setuptools.errors.CompileError, match=message):
        build(given, tmp_path)


def test_an_unknown_value_is_refused(configure):
    with pytest.raises(ValueError, match="NCFAST_CUDA must be 0 or 1, got 'yes'"):
        configure("works", NCFAST_CUDA="yes")
