"""Bridge from setuptools to CMake, which knows how to build the extension (CMakeLists.txt, docs/build.md)."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
OPTIONS = (
    "MFX_CUDA",
    "MFX_CUDA_ARCHS",
    "MFX_CUTLASS_DIR",
    "MFX_CPU_ISAS",
    "MFX_NATIVE",
    "MFX_LINEINFO",
    "MFX_SANITIZE",
    "MFX_WERROR",
)


def is_of_another_checkout(build: Path) -> bool:
    """Whether a build folder was made elsewhere or for other sources, as in a copied checkout: CMake refuses it."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return False
    made_for = dict(re.findall(r"^(\w+):INTERNAL=(.*)$", cache.read_text(), re.MULTILINE))
    here = {"CMAKE_HOME_DIRECTORY": ROOT, "CMAKE_CACHEFILE_DIR": build.resolve()}
    return any(made_for.get(name) != path.as_posix() for name, path in here.items())


class CMakeBuild(build_ext):
    """Configures, builds and installs the native libraries into the package."""

    def run(self) -> None:
        # Where pip puts them, in an environment that was named by its python and not activated.
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("moduleformer_ext: cmake was not found; install it with `pip install cmake ninja` and try again.")
        package = Path(self.get_ext_fullpath("moduleformer_ext._C")).resolve().parent
        # A fixed build folder makes the next build incremental, editable or not.
        build = Path(os.environ.get("MFX_BUILD_DIR", ROOT / "build" / f"native-{sys.implementation.cache_tag}"))
        # What is not set now returns to its default, whatever an earlier build was given.
        options = [f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}" for name in OPTIONS]
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        if is_of_another_checkout(build):
            print(f"moduleformer_ext: {build} was made for another source folder; starting afresh", file=sys.stderr)
            options += ["--fresh"]
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
            subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)
        except subprocess.CalledProcessError as error:
            step = " ".join(map(str, error.cmd))
            sys.exit(
                f"moduleformer_ext: building the native extension failed at `{step}`; its own message is above. "
                "docs/build.md lists what a build needs and the environment variables that steer it."
            )


class WithBenchmarks(build_py):
    """Puts the benchmarks into the package, for `moduleformer-ext bench`; in a checkout they stay where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        source, target = ROOT / "benchmarks", Path(self.build_lib) / "moduleformer_ext" / "benchmarks"
        for path in (*source.glob("*.*"), *source.glob("ops/*.py"), *source.glob("peers/*.py")):
            if path.suffix in (".py", ".ini"):
                self.mkpath(str(target / path.parent.relative_to(source)))
                self.copy_file(str(path), str(target / path.relative_to(source)))


def version() -> str:
    """Of the package; a wheel for one torch and CUDA release has a label that names both (docs/build.md)."""
    text = (ROOT / "python" / "moduleformer_ext" / "_version.py").read_text(encoding="utf-8")
    label = os.environ.get("MFX_VERSION_LABEL")
    return re.search(r'"(.+)"', text)[1] + (f"+{label}" if label else "")


def package_page() -> str:
    """The README for an index of packages, where its relative links would lead nowhere: they become paths."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def path_of(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        return f"({text}: `{path}`)" if image else f"`{path}`" if text == path else f"{text} (`{path}`)"

    head, text = re.sub(r"(!?)\[([^]]*)\]\((?!\w+://)([^)]+)\)", path_of, readme).split("\n", 1)
    return f"{head}\n\nPaths such as `docs/build.md` are those of the source tree.\n{text}"


setup(
    version=version(),
    long_description=package_page(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("moduleformer_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithBenchmarks},
)
