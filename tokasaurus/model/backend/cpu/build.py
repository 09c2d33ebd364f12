"""Compiles a C++ file into a shared library, once for each instruction set, and loads it.

Libraries are kept in ``$XDG_CACHE_HOME/tokasaurus``. Their names are hashes of everything that
decides the compiler's output: the source, the headers beside it, the flags, the compiler's version
and the architecture. A library is written under a temporary name and then renamed, so processes
that start together never read half a file. They do not compile the same library twice either:
the second one waits for the first. Of each file and instruction set, the libraries that were used
last are kept, enough for a few versions of the engine side by side.

OpenMP: torch has its own runtime, and a second pool of threads in the process would compete with it
for the cores. So the library is first linked without a runtime, and its calls find torch's. Where
they do not (another compiler, another build of torch), it is linked with one as usual.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokasaurus.model.instruction_sets import AUTO, InstructionSet, candidate_sets

__all__ = ["BuildError", "LoadedLibrary", "load_library", "loaded_libraries"]

log = logging.getLogger(__name__)

_COMPILERS = ("g++", "c++", "clang++")
_COMPILE = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    # For vectorisation, without effect on any promised result: no errno, no traps.
    "-fno-math-errno",
    "-fno-trapping-math",
    # A kernel says itself where it fuses a multiplication and an addition. The compiler would fuse
    # in one loop and not in another, and results would depend on which one a row happens to meet.
    "-ffp-contract=off",
)
_LINKING = ((), ("-fopenmp",))
_TIMEOUT_S = 300
# Libraries of one file and instruction set.
_NUM_KEPT = 4
# No build takes longer, so a directory that is older was left behind by one that was killed.
_ABANDONED_S = 3600


class BuildError(Exception):
    """There is no compiler, or it failed. The message names the compiler and the failure."""


@dataclass(frozen=True)
class LoadedLibrary:
    """What a library that this process runs was compiled from.

    Attributes:
        instruction_set: the name of the set that it was compiled for.
        source: SHA-256 of its source and the headers beside it.
        flags: of the compiler.
        compiler: the first line of what it says of its version.
    """

    instruction_set: str
    source: str
    flags: str
    compiler: str


# By source and the instruction set that was asked for.
_loaded: dict[tuple[str, str], LoadedLibrary] = {}


def loaded_libraries(instruction_set: str) -> dict[str, LoadedLibrary]:
    """The libraries that this process has loaded for an instruction set, by their sources' names.

    Args:
        instruction_set: as it was asked for: the name of one, or "auto".
    """
    return {name: each for (name, asked), each in _loaded.items() if asked == instruction_set}


@dataclass(frozen=True)
class _Recipe:
    compiler: tuple[str, ...]
    instructions: InstructionSet
    linking: tuple[str, ...]

    def commands(self, source: Path, library: Path) -> list[list[str]]:
        objects = library.with_suffix(".o")
        compiler = list(self.compiler)
        return [
            [
                *(*compiler, *_COMPILE, *self.instructions.options),
                *("-c", str(source), "-o", str(objects)),
            ],
            [*compiler, "-shared", *self.linking, str(objects), "-o", str(library)],
        ]


def load_library(source: Path, instruction_set: str = AUTO) -> ctypes.CDLL:
    """Loads the library of a C++ file, and compiles it first if this machine has not done so.

    torch must be imported before.

    Args:
        source: the file. The headers that it includes are beside it.
        instruction_set: the name of one, or "auto" for the best that processor and compiler know.

    Raises:
        BuildError: the library cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """
    candidates = candidate_sets(instruction_set)
    compiler = _find_compiler()
    directory = _cache_directory()
    complaint = ""
    for instructions, linking in itertools.product(_variants(candidates), _LINKING):
        recipe = _Recipe(compiler, instructions, linking)
        library = directory / f"{source.stem}-{instructions.name}-{_key(source, recipe)}.so"
        try:
            loaded = _load(source, recipe, library)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler[0]} ran for more than {_TIMEOUT_S} s") from error
        except subprocess.CalledProcessError as error:
            complaint = complaint or _first_error(error)
        except OSError as error:
            complaint = complaint or str(error)
        else:
            log.debug("%s runs with %s instructions", source.name, instructions.name)
            if instructions.name not in {each.instruction_set for each in _loaded.values()}:
                log.info("kernels run with %s instructions", instructions.name)
            _loaded[source.stem, instruction_set] = _described(source, recipe)
            return loaded
    raise BuildError(f"{compiler[0]} failed: {complaint}")


def _variants(candidates: Iterable[InstructionSet]) -> Iterator[InstructionSet]:
    """Each set with this processor's extensions, then without: the compiler may not know them."""
    for instructions in candidates:
        extended, plain = instructions.with_extensions(), replace(instructions, extensions=())
        yield extended
        if plain != extended:
            yield plain


def _find_compiler() -> tuple[str, ...]:
    chosen = os.environ.get("CXX")
    if chosen:
        return tuple(shlex.split(chosen))
    for name in _COMPILERS:
        if shutil.which(name):
            return (name,)
    raise BuildError(f"no C++ compiler found (looked for $CXX, {', '.join(_COMPILERS)})")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(base) / "tokasaurus"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BuildError(f"cannot make {directory}; set XDG_CACHE_HOME: {error}") from error
    return directory


def _texts(source: Path) -> list[str]:
    """The texts that the compiler reads: the source, and the headers beside it."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    return [file.read_text(encoding="utf-8") for file in files]


def _described(source: Path, recipe: _Recipe) -> LoadedLibrary:
    flags = (*_COMPILE, *recipe.instructions.options)
    version = _compiler_version(recipe.compiler).splitlines() or [""]
    sources = hashlib.sha256("\0".join(_texts(source)).encode()).hexdigest()
    return LoadedLibrary(recipe.instructions.name, sources, " ".join(flags), version[0])


def _key(source: Path, recipe: _Recipe) -> str:
    parts = [
        *_texts(source),
        repr((recipe, _COMPILE)),
        _compiler_version(recipe.compiler),
        platform.machine(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _compiler_version(compiler: tuple[str, ...]) -> str:
    try:
        told = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run {shlex.join(compiler)}: {error}") from error
    return told.stdout


def _load(source: Path, recipe: _Recipe, library: Path) -> ctypes.CDLL:
    if not _is_there(library):
        with _lock(source):
            if not _is_there(library):
                _build(source, recipe, library)
                _remove_old(library, f"{source.stem}-{recipe.instructions.name}")
    return ctypes.CDLL(str(library))


def _is_there(library: Path) -> bool:
    """Whether a library exists. If so, no other process removes it soon."""
    try:
        modified_ns = library.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # another user's
        os.utime(library, ns=(time.time_ns(), modified_ns))
    return True


@contextlib.contextmanager
def _lock(source: Path) -> Iterator[None]:
    """Keeps other processes from compiling the same file at the same time.

    Where files cannot be locked it does nothing, and several processes may compile.
    """
    with source.open("rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_old(built: Path, kind: str) -> None:
    """Removes the libraries that were used least recently, and what killed builds left behind.

    A process that has loaded a library can still run it.
    """
    directory = built.parent
    used = {path: _used_s(path) for path in directory.glob(f"{kind}-*.so") if path != built}
    for path in sorted(used, key=lambda path: -used[path])[_NUM_KEPT - 1 :]:
        if _used_s(path) > used[path]:  # by another process, just now
            continue
        with contextlib.suppress(OSError):
            path.unlink()
    for path in directory.glob("build-*"):
        if _used_s(path) < time.time() - _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _used_s(path: Path) -> float:
    """When a file was used; now, if another process has just removed it."""
    try:
        return path.stat().st_atime
    except FileNotFoundError:
        return time.time()


def _build(source: Path, recipe: _Recipe, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as directory:
        built = Path(directory) / library.name
        log.info("compiling %s, once for %s", source.name, recipe.instructions.name)
        for command in recipe.commands(source, built):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        built.replace(library)


def _first_error(error: subprocess.CalledProcessError) -> str:
    lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"{told} (exit status {error.returncode})"
