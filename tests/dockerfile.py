"""Reads the Dockerfile, and runs the steps of a target without Docker.

All stages share one directory, which stands for the root of their file systems: absolute paths of
``ENV``, ``WORKDIR`` and ``COPY`` are below it. Steps that change the system (``apt-get``,
``useradd``) do not run, so commands that they would install must be there.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Build", "Stage", "Step", "stages_of"]

_OF_THE_SYSTEM = ("apt-get ", "useradd ")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so")


@dataclass(frozen=True)
class Step:
    """An instruction, such as ``RUN``, and what stands behind it."""

    name: str
    value: str


@dataclass(frozen=True)
class Stage:
    """``FROM parent AS name``, and the steps below it."""

    name: str
    parent: str
    steps: list[Step] = field(default_factory=list)


def stages_of(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in its order. Each must have a name."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, value = line.split(None, 1)
        if name == "FROM":
            parent, _, own = value.split()
            stages.append(Stage(own, parent))
        else:
            stages[-1].steps.append(Step(name, value))
    return {stage.name: stage for stage in stages}


class Build:
    """A target as Docker would build it, in a directory.

    Args:
        text: the Dockerfile.
        context: the directory that it copies from.
        root: the directory that stands for the root.
        arguments: in place of the defaults of ``ARG``.
        environment: that commands have, besides what ``ENV`` says.

    Attributes:
        left_out: commands that did not run.
    """

    def __init__(
        self,
        text: str,
        context: Path,
        root: Path,
        arguments: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        self._stages = stages_of(text)
        self._context, self._root = context, root
        self._arguments = arguments
        self._outer = dict(environment)
        self._built: set[str] = set()
        self.left_out: list[str] = []

    def run(self, target: str) -> Image:
        """Runs the steps of the target, and those of the stages that it needs."""
        image = Image(self._outer, self._root)
        for stage in reversed(list(self._line_of(target))):
            for step in stage.steps:
                self._carry_out(step, image, is_new=stage.name not in self._built)
            self._built.add(stage.name)
        return image

    def _line_of(self, target: str) -> Iterator[Stage]:
        while target in self._stages:
            yield self._stages[target]
            target = self._stages[target].parent

    def _carry_out(self, step: Step, image: Image, *, is_new: bool) -> None:
        name, value = step.name, step.value
        if name == "ENV":
            for word in shlex.split(value):
                key, _, text = word.partition("=")
                image.environment[key] = image.expanded(self._placed(text))
        elif name == "ARG":
            key, _, default = value.partition("=")
            image.arguments[key] = self._arguments.get(key, default)
        elif name == "WORKDIR":
            image.directory = Path(self._placed(value))
            image.directory.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            self._copy(value.split(), image)
        elif name == "RUN" and is_new:
            self._run(value, image)
        elif name == "ENTRYPOINT":
            image.entrypoint = json.loads(value)
        elif name == "HEALTHCHECK":
            image.health_check = json.loads(value.partition("CMD ")[2])
        elif name not in {"RUN", "USER", "EXPOSE"}:
            raise ValueError(f"{name}: this instruction is not known here")

    def _placed(self, path: str) -> str:
        return f"{self._root}{path}" if path.startswith("/") else path

    def _copy(self, words: Sequence[str], image: Image) -> None:
        if words[0].startswith("--from="):
            # Stages share the root, so what another one made is there already.
            stage, source, target = words[0].removeprefix("--from="), *words[1:]
            self.run(stage)
            if source != target or not Path(self._placed(source)).exists():
                raise ValueError(f"COPY {' '.join(words)}: there is no such path in stage {stage}")
            return
        *sources, target = words
        for source in sources:
            path, place = self._context / source, image.directory / target
            if path.is_dir():
                shutil.copytree(path, place, ignore=_NOT_COPIED, dirs_exist_ok=True)
            else:
                shutil.copy(path, place)

    def _run(self, command: str, image: Image) -> None:
        if command.startswith(_OF_THE_SYSTEM):
            self.left_out.append(command)
            return
        subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=image.directory,
            env={**image.environment, **image.arguments},
            check=True,
        )


class Image:
    """What a build leaves besides files."""

    def __init__(self, environment: Mapping[str, str], root: Path) -> None:
        self.environment = dict(environment)
        self.arguments: dict[str, str] = {}
        self.directory = root
        self.entrypoint: list[str] = []
        self.health_check: list[str] = []

    def expanded(self, text: str) -> str:
        known = {**self.arguments, **self.environment}
        return _VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text)
