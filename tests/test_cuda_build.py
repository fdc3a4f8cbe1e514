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
        return dict(pool.map(build, ("class_moments", "certify")))


@pytest.mark.parametrize(("source", "kernels"), [("class_moments", 14), ("certify", 3)])
def test_no_spills(cubins, source, kernels):
    said = cubins[source][1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills == [("0", "0", "0")] * kernels


def test_wide_loads(cubins):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("there is no nvdisasm")
    listing = subprocess.run(
        [tool, "-c", cubins["class_moments"][0]], capture_output=True, text=True, check=True
    ).stdout
    vectors = []
    for body in re.split(r"\.section\s+\.text\.", listing)[1:]:
        vector = re.match(r"\S*moments_rowsILi\dELi(\d)E", body)
        if vector:
            vectors.append(vector[1])
            # Four rows in flight.
            assert len(re.findall(r"LDG\.E\.128", body)) >= (0 if vector[1] == "1" else 4), body[:80]
    assert sorted(vectors) == ["1", "1", "1", "1", "2", "4", "8", "8"]
