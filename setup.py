"""Packages, and the native CPU library. Everything else is in pyproject.toml.

The folder kernels/ is installed as cosup.kernels: a Hugging Face package owns the bare name. bench/ likewise as
cosup.bench.
"""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Build kernels/cpu with CMake. Where that fails the package still installs and runs its PyTorch path."""

    def build_extension(self, ext):
        source = Path(__file__).parent.resolve()
        build = Path(self.build_temp).resolve() / "native"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            subprocess.run(
                ["cmake", *generator, f"-DCMAKE_INSTALL_PREFIX={target}", str(source)], cwd=build, check=True
            )
            subprocess.run(["cmake", "--build", ".", "--target", "install"], cwd=build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"cosup: native CPU kernels not built ({error}); the PyTorch path is used", stacklevel=1)

    def copy_extensions_to_source(self):  # an editable install: CMake has installed beside the sources already
        pass

    def get_ext_fullpath(self, name):
        if self.inplace or self.editable_mode:
            return str(Path(__file__).parent / "kernels" / "native_library")
        return super().get_ext_fullpath(name)

    def get_outputs(self):
        if self.inplace or self.editable_mode:
            return []
        folder = Path(self.get_ext_fullpath("cosup.kernels.native_library")).parent
        return [str(path) for path in folder.glob("*cosup_cpu.*")]


class AnyPythonWheel(bdist_wheel):
    """The library has a plain C interface: one wheel per platform serves every Python and every torch."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["cosup", "cosup.data", "cosup.compat", "cosup.integrations", "cosup.kernels", "cosup.bench",
              "cosup.bench.gpu"],
    package_dir={"cosup": "cosup", "cosup.kernels": "kernels", "cosup.bench": "bench", "cosup.bench.gpu": "bench/gpu"},
    package_data={"cosup": ["py.typed"]},
    ext_modules=[Extension("cosup.kernels.native_library", [])] if sys.platform != "win32" else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
