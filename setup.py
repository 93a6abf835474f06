"""The C++ extension; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile(default=0).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "mixloader._core",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=20,
            # A product and a sum are fused only where the source says so: the same arithmetic in every build.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror=return-type", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
