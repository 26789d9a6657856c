"""Builds the compiled kernels for CPUs, one shared library, where a C++ compiler is; all else is in pyproject.toml.

The package works without them: XLA's programs then do their work, several times slower. So a failure to build only
says so, unless the environment variable FINESERVE_BUILD_KERNELS is `require`, as those who make wheels want it; `skip`
does not try.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

VARIABLE = "FINESERVE_BUILD_KERNELS"
SOURCES = Path("pallas_kernels/cpu/src")
FLAGS = ["-std=gnu++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VNNI = [*AVX512, "-mavx512vnni"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512_vnni": VNNI, "avx512_bf16": [*VNNI, "-mavx512bf16"]}


class BuildKernels(build_ext):
    """Compiles each instruction set's source with flags of its own; which of them runs is decided at run time."""

    def run(self) -> None:
        wanted = os.environ.get(VARIABLE, "")
        if wanted not in ("", "require", "skip"):
            sys.exit(f"{VARIABLE}={wanted!r} is neither require nor skip; unset it to build the kernels if possible")
        if wanted == "skip":
            self.extensions = []
            return
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            if wanted == "require":
                raise
            self.extensions = []
            print(
                f"fineserve_jax: THE COMPILED KERNELS FOR CPUS WERE NOT BUILT ({error}). XLA does their work, several "
                "times slower. Install a C++ compiler (GCC 12 or Clang 15, or newer), and install again.",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise BaseError(f"they are written for GCC and Clang, not for {self.compiler.compiler_type}")
        flags = {"library": [], "baseline": []}
        if platform.machine().lower() in ("x86_64", "amd64"):
            flags |= INSTRUCTION_SETS
        objects = []
        for name, own in flags.items():
            objects += self.compiler.compile(
                [str(SOURCES / f"{name}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=["-isystem", str(xla_headers()), *FLAGS, *own],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), build_temp=self.build_temp, target_lang="c++"
        )


def xla_headers() -> Path:
    """The headers of XLA's interface for custom calls, which jaxlib brings; found without importing it."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        raise BaseError("jaxlib, which has the headers, is not installed where the package is built")
    return Path(found.submodule_search_locations[0]) / "include"


kernels = Extension(
    "fineserve_jax.pallas_kernels.cpu._kernels",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
