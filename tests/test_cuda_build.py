"""What nvcc makes of the kernels: no spills, 128-bit loads in flight together, as machine code is shipped."""

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


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
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


def registers(text):
    """The numbers of the registers that operands name."""
    named = set()
    for number, pair in re.findall(r"\bR(\d+)\b(?:\.reuse)?(\.64)?", text):
        named |= {int(number), int(number) + bool(pair)}
    return named


def assert_in_flight_together(code, loads, words):
    """From the first of these loads to the last nothing branches, and nothing touches what they bring: an
    instruction that did would wait for it.
    """
    between = code[loads[0] : loads[-1] + 1]
    assert not [line for line in between if re.search(r"\.L_|BRA|BSSY|BSYNC|WARPSYNC", line)]
    brought = set()
    for place, line in enumerate(between, loads[0]):
        assert not registers(line) & brought, line
        if place in loads:
            first = int(re.search(r"LDG\S* R(\d+)", line)[1])
            brought |= set(range(first, first + words))


def test_four_rows_in_flight(cubins):
    """Their keys and indices first, then the rows."""
    vectors = []
    for name, body in kernels_of(cubins["class_moments"][0]).items():
        vector = re.search(r"moments_rowsILi\dELi(\d)E", name)
        if vector is None:
            continue
        vectors.append(vector[1])
        code = [line for line in body.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_)", line)]
        wide = [place for place, line in enumerate(code) if "LDG.E.128" in line]
        assert len(wide) == (0 if vector[1] == "1" else 4), name
        if wide:
            listed = [place for place in range(wide[0]) if re.search(r"LDG\.E R", code[place])]
            assert_in_flight_together(code, wide, 4)
            assert_in_flight_together(code, listed[-8:], 1)
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
