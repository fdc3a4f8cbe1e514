"""Build ncfast._cpu and, where there is an nvcc, ncfast._cuda.

They take raw pointers and link no libtorch: one build serves every version of torch.

NCFAST_CUDA=0 leaves ncfast._cuda out; NCFAST_CUDA=1 makes it an error when it cannot be built.
NCFAST_CUDA_ARCHS="80 90" chooses its architectures, from 80 (cp.async) on; no GPU is needed to build it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError

CUDA = os.environ.get("NCFAST_CUDA") or "auto"
if CUDA not in ("0", "1", "auto"):
    raise ValueError(f"NCFAST_CUDA must be 0 or 1, got {CUDA!r}")
NVCC = shutil.which("nvcc")


def architectures():
    """Machine code for each architecture, and PTX of the last one for those to come."""
    chosen = (os.environ.get("NCFAST_CUDA_ARCHS") or "").replace(",", " ").split()
    for number in chosen:
        if not re.fullmatch(r"\d+[af]?", number) or int(number.rstrip("af")) < 80:
            raise ValueError(f"NCFAST_CUDA_ARCHS lists numbers such as 80 or 90, from 80 on, got {number!r}")
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {name.removeprefix("compute_") for name in listed.split()}
    chosen = chosen or [number for number in ("80", "90", "100") if number in known]
    if not chosen:
        raise CompileError(f"{NVCC} knows no architecture from 80 on")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    return [*codes, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


class BuildExt(build_ext):
    """Also builds ncfast._cuda, by one call of nvcc; where it is not built, an older one does not stay."""

    def run(self):
        name = self.get_ext_filename("ncfast._cuda")
        if "ncfast._cuda" not in [ext.name for ext in self.extensions]:
            Path(self.build_lib, name).unlink(missing_ok=True)
        if self.inplace:
            Path(name).unlink(missing_ok=True)  # also as what is copied there would have to be newer
        super().run()

    def build_extension(self, ext):
        if ext.name != "ncfast._cuda":
            return super().build_extension(ext)
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self.call_nvcc(ext, target)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            raise CompileError(str(error)) from error

    def call_nvcc(self, ext, target):
        """Unless the last call was the same, of files that have not changed since."""
        if NVCC is None:
            raise CompileError("NCFAST_CUDA=1, but there is no nvcc on the PATH")
        includes = ["csrc", pybind11.get_include(), sysconfig.get_path("include")]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-g0,-Wall,-Wextra"
        command = [NVCC, "-shared", "-std=c++17", "-O3", "--threads=0", *architectures(), host]
        command += [*(f"-I{path}" for path in includes), *ext.sources, "-o", str(target)]
        called = Path(self.build_temp, "_cuda.command")
        newest = max(os.path.getmtime(name) for name in [*ext.sources, *ext.depends, __file__])
        same = called.exists() and called.read_text() == shlex.join(command)
        if same and not self.force and target.exists() and os.path.getmtime(target) > newest:
            return
        for path in (target, called):
            path.parent.mkdir(parents=True, exist_ok=True)
        called.unlink(missing_ok=True)
        subprocess.run(command, check=True)
        called.write_text(shlex.join(command))


extensions = [
    Pybind11Extension(
        "ncfast._cpu",
        [*sorted(glob("csrc/cpu/*.cpp")), "csrc/bind.cpp"],
        depends=sorted(glob("csrc/cpu/*.h")),
        include_dirs=["csrc"],
        cxx_std=17,
        # How vectors are passed concerns nobody else: the functions that pass them are internal.
        extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-pthread"],
        extra_link_args=["-pthread", "-ldl"] if sys.platform == "linux" else ["-pthread"],
    )
]
if CUDA == "1" or (CUDA == "auto" and NVCC):
    extensions.append(
        Extension(
            "ncfast._cuda",
            [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/bind.cpp"],
            depends=[*sorted(glob("csrc/cuda/*.h")), *sorted(glob("csrc/cuda/*.cuh"))],
            optional=CUDA == "auto",
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
