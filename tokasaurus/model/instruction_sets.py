"""The instruction sets that kernels are compiled for, and which of them this processor runs.

A library is compiled for a named set rather than for the machine at hand. So a cache of libraries
may move to another machine, and a machine can test what older ones run. A set may have extensions
for products of integers, which only some of its processors have. They change no result.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokasaurus.errors import ConfigError

__all__ = [
    "AUTO",
    "INSTRUCTION_SETS",
    "InstructionSet",
    "bfloat16_instructions",
    "candidate_sets",
    "processor_features",
    "processor_name",
    "usable_sets",
]

AUTO = "auto"

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class InstructionSet:
    """A set of instructions.

    Attributes:
        name: the value of the flag ``instruction_set`` that asks for it.
        features: that a processor must have, as /proc/cpuinfo names them.
        options: that tell the compiler to use it.
        extensions: features of some of its processors, and the option for each.
    """

    name: str
    features: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    extensions: tuple[tuple[str, str], ...] = ()

    def with_extensions(self) -> InstructionSet:
        """The set with the options for those extensions that this processor has."""
        features = _processor_features()
        more = tuple(option for feature, option in self.extensions if feature in features)
        return replace(self, options=(*self.options, *more), extensions=())


_AVX2 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16")
_V4 = "-march=x86-64-v4"
_VNNI = ("avx512_vnni", "-mavx512vnni")

# The best first. The last one is what the compiler takes for granted.
INSTRUCTION_SETS = (
    InstructionSet(
        "amx",
        (*_AVX512_BF16, "amx_tile", "amx_bf16"),
        (_V4, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (_VNNI, ("amx_int8", "-mamx-int8")),
    ),
    InstructionSet("avx512_bf16", _AVX512_BF16, (_V4, "-mavx512bf16"), (_VNNI,)),
    InstructionSet("avx512", _AVX512, (_V4,), (_VNNI,)),
    InstructionSet("avx2", _AVX2, ("-march=x86-64-v3",), (("avx_vnni", "-mavxvnni"),)),
    InstructionSet("generic"),
)


def processor_features() -> frozenset[str]:
    """The features of this processor that some instruction set asks for."""
    asked = {feature for each in INSTRUCTION_SETS for feature in each.features}
    return _processor_features() & asked


@cache
def processor_name() -> str:
    """What the processor calls itself; "unknown" where the system does not say."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    line = next((line for line in lines if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or "unknown"


def usable_sets() -> tuple[InstructionSet, ...]:
    """The sets that this processor runs, the best first."""
    features = _processor_features()
    return tuple(each for each in INSTRUCTION_SETS if features.issuperset(each.features))


def candidate_sets(name: str) -> tuple[InstructionSet, ...]:
    """The sets to try in turn.

    Args:
        name: of a set, or "auto" for all that this processor runs.

    Raises:
        ConfigError: the processor does not run this set. It names what is missing.
    """
    if name == AUTO:
        return usable_sets()
    (chosen,) = (each for each in INSTRUCTION_SETS if each.name == name)
    missing = [each for each in chosen.features if each not in _processor_features()]
    if missing:
        names = " or ".join((AUTO, *(each.name for each in usable_sets())))
        raise ConfigError(
            f"instruction_set={name}: this processor has no {', '.join(missing)}; set {names}"
        )
    return (chosen,)


def bfloat16_instructions(name: str) -> str | None:
    """The set that kernels will use, if it multiplies bf16; None if it does not.

    Args:
        name: of a set, or "auto" for the best one that this processor runs.

    Raises:
        ConfigError: the processor does not run this set.
    """
    best = candidate_sets(name)[0]
    return best.name if "avx512_bf16" in best.features else None


@cache
def _processor_features() -> frozenset[str]:
    """What /proc/cpuinfo lists; nothing on other systems and other processors than x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
