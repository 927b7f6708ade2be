"""Builds the optional C kernels; everything else is in pyproject.toml.

The library is plain C behind ctypes: torch is not needed to build it, and one file serves every
Python. Without a working compiler the installation succeeds and the torch path is used.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("statewright", "ops", "csrc")
NAME = "statewright.ops.libstatewright"


class BuildOptionalKernels(build_ext):
    def get_ext_filename(self, fullname):
        # No Python ABI in the name: ctypes opens the file, the import system never does.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        # A failed build would otherwise leave the previous library in place, and in use.
        built = [Path(self.build_lib) / self.get_ext_filename(NAME)]
        if self.inplace or self.editable_mode:
            built.append(ROOT / self.get_ext_filename(NAME))
        for path in built:
            path.unlink(missing_ok=True)
        self.force = True
        super().run()

    def build_extension(self, ext):
        flags = (ROOT / CSRC / "flags.txt").read_text().split()
        errors = []
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args = ["-std=c11", "-fvisibility=hidden", *flags, *openmp]
            ext.extra_link_args = openmp
            try:
                super().build_extension(ext)
                return
            except Exception as error:
                errors.append(str(error))
        self.warn(
            "the C kernels were not built; statewright works without them, on the slower torch "
            f"path ({errors[-1]})"
        )


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


digest = runpy.run_path(str(ROOT / CSRC.parent / "native_digest.py"))["source_digest"]
headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC).glob("*.[ht]*"))
setup(
    cmdclass={"build_ext": BuildOptionalKernels, "bdist_wheel": AnyPythonWheel},
    package_data={
        "statewright": ["py.typed"],
        "statewright.ops": ["csrc/*.c", "csrc/*.h", "csrc/*.txt"],
        "statewright.demos": ["book.txt", "*/*.json", "*/*.safetensors"],
        "statewright.evaluation.lm_eval_tasks": ["*.yaml"],
    },
    ext_modules=[
        Extension(
            NAME,
            [str(CSRC / "statewright.c")],
            depends=headers,
            define_macros=[("SW_DIGEST", f'"{digest(ROOT / CSRC)}"')],
            optional=True,
        )
    ],
)
