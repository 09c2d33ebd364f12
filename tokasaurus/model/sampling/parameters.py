"""The sampling parameters of slots and of sampling rows, on the host: one column for each."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokasaurus.protocol.messages import SAMPLING_NUMBERS, Sampling, SlotParameters

__all__ = ["SamplingParameters"]

_FILTERS = {name: off for name, off in SAMPLING_NUMBERS.items() if name != "temperature"}
# What the requests say.
_SAMPLING = np.dtype(
    [
        *(
            (name, np.float32 if type(x) is float else np.int32)
            for name, x in SAMPLING_NUMBERS.items()
        ),
        ("logprobs_mode", np.int32),
    ]
)
# What ``SlotParameters`` says of each slot itself.
_OWN = np.dtype(
    [
        ("seed", np.int64),
        ("sample_index", np.int32),
        ("num_generated", np.int32),
        ("num_logprobs", np.int32),
    ]
)
_ROW = np.dtype([*_SAMPLING.descr, *_OWN.descr])
_values_of = attrgetter(*(_SAMPLING.names or ()))


class SamplingParameters:
    """One row for each slot or sampling row, one column for each of these names:

    - the numbers of ``Sampling``, and ``logprobs_mode``;
    - ``seed`` and ``sample_index``;
    - ``num_generated``, the position among the generated tokens of the next draw;
    - ``num_logprobs``: -1 for none, 0 for the chosen token's, k for the top k as well.

    ``parameters[name]`` is a column, which can be written to.
    """

    def __init__(self, rows: NDArray[np.void]) -> None:
        self._rows = rows

    @classmethod
    def neutral(cls, num_rows: int) -> SamplingParameters:
        """Plain sampling at temperature 1, no logprobs."""
        parameters = cls(np.empty(num_rows, _ROW))
        parameters.clear()
        return parameters

    def clear(self) -> None:
        """Makes all rows neutral, in place."""
        self._rows[:] = np.array((*_values_of(Sampling()), 0, 0, 0, -1), _ROW)

    def assign(self, parameters: SlotParameters) -> None:
        """Overwrites the rows of slots that sequences enter."""
        slots = parameters.slots
        samplings = np.array([_values_of(each) for each in parameters.samplings], _SAMPLING)
        entering = samplings[parameters.sampling_index]
        for name in _SAMPLING.names or ():
            self._rows[name][slots] = entering[name]
        for name in _OWN.names or ():
            self._rows[name][slots] = getattr(parameters, name)

    def take(self, rows: NDArray[np.integer[Any]] | slice) -> SamplingParameters:
        """A copy of some rows, or a view of a slice."""
        return SamplingParameters(self._rows[rows])

    def without_filters(self) -> SamplingParameters:
        """A copy with the temperature alone."""
        rows = self._rows.copy()
        for name, off in _FILTERS.items():
            rows[name] = off
        return SamplingParameters(rows)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._rows[name]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def greedy(self) -> NDArray[np.bool_]:
        greedy: NDArray[np.bool_] = self["temperature"] == 0
        return greedy
