"""Builds the native CPU library while Septet is installed (all else is in pyproject.toml).

Called by pip through setuptools. The compiler's work is csrc/build.py's; without a compiler, or if it fails, the
installation goes on and says once that the torch reference will be used.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NAME = "septet.kernels.native.libseptet_native"


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        native = runpy.run_path(str(HERE / "csrc" / "build.py"))
        try:
            native["build"](Path(self.get_ext_fullpath(ext.name)))
        except (native["BuildError"], OSError) as error:
            print(f"warning: native CPU library not built, Septet will use torch on CPUs: {error}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # a plain library for ctypes: no Python version in its name

    def copy_extensions_to_source(self) -> None:
        if Path(self.build_lib, self.get_ext_filename(NAME)).exists():
            super().copy_extensions_to_source()


class WithNative(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[Extension(NAME, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
    distclass=WithNative,
)
