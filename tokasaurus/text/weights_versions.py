"""The versions of the weights that an engine has had, and the labels that clients gave them.

The weights that the engine starts with are version 0. Each update makes the next number.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FIRST_LABEL", "WeightsVersions"]

FIRST_LABEL = "default"
"""The label of version 0, as in SGLang."""


class WeightsVersions:
    """The versions of one engine.

    Attributes:
        version: of the weights that run now.
        revision: changes with every change of the version or of a label.
    """

    def __init__(self) -> None:
        self.version = 0
        self.revision = 0
        self._last_taken = 0  # the newest that any replica has had
        self._pending: list[int] = []  # updates without an answer
        self._labels: dict[int, str] = {}  # by version, those that clients gave

    @property
    def are_original(self) -> bool:
        """Whether there was neither an update nor a label."""
        return self.version == 0 and 0 not in self._labels

    def label(self, version: int | None = None) -> str:
        """The label of a version, by default of the present one: a client's, or the number."""
        number = self.version if version is None else version
        return self._labels.get(number, str(number) if number else FIRST_LABEL)

    def rename(self, label: str) -> None:
        """Gives the present version another label."""
        self._labels[self.version] = label
        self.revision += 1

    @property
    def labels(self) -> dict[int, str]:
        """The labels that clients gave, by version."""
        return dict(self._labels)

    def follow(self, version: int, labels: Mapping[int, str]) -> None:
        """Takes over what another process knows of the engine's versions."""
        self.version, self._labels = version, dict(labels)
        self.revision += 1

    def reserve(self, label: str | None) -> int:
        """The number of the next update.

        Args:
            label: of the version, once it runs; None is its number.
        """
        version = max(self._last_taken, *self._pending, 0) + 1
        self._pending.append(version)
        self._labels.pop(version, None)
        if label is not None:
            self._labels[version] = label
        self.revision += 1
        return version

    def adopt(self, version: int) -> None:
        """The update with this number has succeeded."""
        self._forget(version)
        self.version = max(self.version, version)
        self._last_taken = max(self._last_taken, version)

    def drop(self, version: int, *, is_taken: bool = False) -> None:
        """The update with this number has failed.

        Args:
            version: of the update.
            is_taken: some replicas have this version. Otherwise the next update may get the number.
        """
        self._forget(version)
        if is_taken:
            self._last_taken = max(self._last_taken, version)
        else:
            self._labels.pop(version, None)

    def _forget(self, version: int) -> None:
        self.revision += 1
        if version in self._pending:
            self._pending.remove(version)
