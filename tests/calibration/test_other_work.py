"""Other work on the machine is seen, and measurements that it disturbed are repeated."""

from __future__ import annotations

import sys
import time

import pytest

from tokasaurus.calibration.other_work import OtherWork, undisturbed


class Shares:
    """As other work that takes these shares while things are measured, one after the other."""

    def __init__(self, *shares):
        self.shares = [value for share in shares for value in (0.0, share)]

    def share(self):
        return self.shares.pop(0)


def test_measurements_that_were_disturbed_are_repeated():
    values, lines = iter("abcdefgh"), []
    shares = Shares(0.01, 0.5, 0.02, 0.2, 0.03)
    found, most = undisturbed(lambda: next(values), 3, shares, lines.append)
    assert (found, most) == (["a", "c", "e"], 0.03)
    assert [line.split()[3] for line in lines] == ["50%", "20%"]


def test_a_machine_that_is_never_quiet_gives_the_least_disturbed_ones():
    values = iter("abcdefgh")
    shares = Shares(0.9, 0.3, 0.8, 0.4, 0.7, 0.6)
    found, most = undisturbed(lambda: next(values), 2, shares, lambda _: None)
    assert (found, most) == (["b", "d"], 0.4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_own_work_is_no_other_work_and_other_work_is():
    """Work that is not counted as own must show; the machine may do more beside it."""
    alone, all_of_it = OtherWork(), OtherWork(lambda: 0.0)
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    own, whole = alone.share(), all_of_it.share()
    assert 0 <= own < whole
    assert whole > 0
