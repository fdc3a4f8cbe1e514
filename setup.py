"""Build ncfast._cpu. It takes raw pointers and links no libtorch: one build serves every version of torch."""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "ncfast._cpu",
            [*sorted(glob("csrc/cpu/*.cpp")), "csrc/bind.cpp"],
            depends=sorted(glob("csrc/cpu/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread", "-ldl"] if sys.platform == "linux" else ["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
