"""A thin driver of CMakeLists.txt, which describes the build.

Environment: CONSTRAINED_OPS_CUDA (on, off, auto), TORCH_CUDA_ARCH_LIST (for example "8.0;9.0+PTX"), CUDA_HOME,
MAX_JOBS, DEBUG (1 for a debug build).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()


def cuda_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's words: "8.0;9.0+PTX" is "80-real;90"."""
    numbers = [word.replace(".", "") for word in arch_list.replace(" ", ";").split(";") if word]
    return ";".join(n.removesuffix("+PTX") if n.endswith("+PTX") else f"{n}-real" for n in numbers)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        debug = self.debug or os.environ.get("DEBUG", "0") not in ("", "0")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
            "CMAKE_INSTALL_PREFIX": str(target),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self.pybind11_cmake(),
            "CONSTRAINED_OPS_CUDA": os.environ.get("CONSTRAINED_OPS_CUDA", "auto"),
        }
        if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options["CONSTRAINED_OPS_CUDA_ARCHITECTURES"] = cuda_architectures(architectures)
        defines = [f"-D{name}={value}" for name, value in options.items()]
        jobs = ["--parallel", jobs] if (jobs := os.environ.get("MAX_JOBS")) else []
        subprocess.run(["cmake", "-S", SOURCE, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build, *jobs], check=True)
        self.remove_cuda_library(target)
        subprocess.run(["cmake", "--install", build], check=True)

    def copy_extensions_to_source(self) -> None:
        """For an editable install; setuptools knows nothing of the CUDA library."""
        super().copy_extensions_to_source()
        package = SOURCE / "constrained_ops"
        self.remove_cuda_library(package)
        for library in Path(self.build_lib, "constrained_ops").glob("_C_cuda*"):
            self.copy_file(str(library), str(package))

    @staticmethod
    def remove_cuda_library(package: Path) -> None:
        """One of an earlier build, which this one may have left out."""
        for library in package.glob("_C_cuda*"):
            library.unlink()

    @staticmethod
    def pybind11_cmake() -> str:
        import pybind11

        return pybind11.get_cmake_dir()


setup(ext_modules=[Extension("constrained_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
