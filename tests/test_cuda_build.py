"""What nvcc makes of the kernels: no spills, 128-bit loads, on every architecture shipped."""

import concurrent.futures
import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def nvdisasm():
    """On the PATH, or the one that comes with Triton."""
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        bundled = pathlib.Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
        found = str(bundled) if bundled.exists() else None
    return found


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100a"])
def cubins(request, tmp_path_factory):
    """{source: (cubin, what ptxas said)}."""
    folder = tmp_path_factory.mktemp(request.param)

    def build(source):
        cubin = folder / f"{source}.cubin"
        options = ["-std=c++17", "-cubin", f"-arch={request.param}", "-Xptxas=-v", f"-I{CSRC}"]
        command = [NVCC, *options, CSRC / f"cuda/{source}.cu", "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return source, (cubin, done.stderr)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, ("class_scatter", "class_moments", "certify")))


@pytest.mark.parametrize(
    ("source", "kernels"), [("class_moments", 14), ("class_scatter", 19), ("certify", 3)]
)
def test_no_spills(cubins, source, kernels):
    said = cubins[source][1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills == [("0", "0", "0")] * kernels


def kernels_of(cubin):
    """{name: SASS} of a cubin."""
    tool = nvdisasm()
    if tool is None:
        pytest.skip("there is no nvdisasm")
    listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"\.section\s+\.text\.", listing)[1:]
    return {body.split(",", 1)[0]: body for body in bodies}


def test_wide_loads(cubins):
    vectors = []
    for name, body in kernels_of(cubins["class_moments"][0]).items():
        vector = re.search(r"moments_rowsILi\dELi(\d)E", name)
        if vector:
            vectors.append(vector[1])
            # Four rows in flight.
            assert len(re.findall(r"LDG\.E\.128", body)) >= (0 if vector[1] == "1" else 4), name
    assert sorted(vectors) == ["1", "1", "1", "1", "2", "4", "8", "8"]


def test_matrix_instructions(cubins):
    """Products on the tensor cores, operands by ldmatrix, rows by 128-bit cp.async where they are aligned."""
    found = []
    for name, body in kernels_of(cubins["class_scatter"][0]).items():
        parameters = re.search(r"scatter_pairsILi(\d)ELi(\d)ELi(\d)E", name)
        if parameters is None:
            continue
        dtype, vector, planes = map(int, parameters.groups())
        found.append((dtype, vector, planes))
        pairs = planes * (planes + 1) // 2  # of planes, times 4 × 4 products of 16 × 8
        assert len(re.findall(r"\bHMMA\.16816\.F32\.BF16\b", body)) >= 16 * pairs, name
        assert re.search(r"\bLDSM\.16\.MT88\.4\b", body), name
        assert bool(re.search(r"\bLDGSTS\.\S*128\b", body)) == (vector > 1), name
    assert sorted(found) == sorted(
        (dtype, vector, planes)
        for dtype, wide in ((0, 4), (2, 8), (3, 8))
        for vector in (1, wide)
        for planes in (1, 2, 3)
    )
