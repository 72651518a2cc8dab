"""Builds the native CPU kernels as an optional extension; all other metadata is in pyproject.toml.

Without a working C++ compiler the install still succeeds, says so, and moetier runs on torch alone.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

NATIVE = Path("kernels/native")
NOTICE = """
moetier: no working C++ compiler: {reason}
moetier: the native CPU kernels were not built. Everything works, but the portable torch path will
moetier: be used: about 100 times slower for a low-bit expert on one token, 3 times slower where
moetier: experts are dequantised (2048 x 1408, AMD Zen 5). To get the kernels, install a C++17
moetier: compiler (Debian/Ubuntu: apt-get install g++) and install moetier again.
"""


class OptionalBuild(build_ext):
    """build_ext that turns a failed compilation into a notice."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CompileError, LinkError, OSError) as error:
            sys.stderr.write(NOTICE.format(reason=str(error)[:200]))


setup(
    ext_modules=[
        Extension(
            "kernels._native",
            sources=sorted(str(p) for p in NATIVE.glob("*.cpp")),
            depends=sorted(str(p) for p in NATIVE.glob("*.h")),
            # No -march: each function says what it needs and is called after asking the processor.
            # No contraction: a product and a sum are fused only where the source says so, so that
            # results are the same alone and in a batch. The warning is one of gcc's own headers.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-Wno-maybe-uninitialized",
                "-ffp-contract=off",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-pthread"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
