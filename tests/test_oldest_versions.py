"""The constraints of ``make test-oldest``."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from oldest_versions import lower_bounds


def test_each_dependency_of_the_package_has_a_lower_bound():
    named = dict(line.split("==") for line in lower_bounds(metadata.requires("tokasaurus"), ["s3"]))
    assert named["torch"] == torch.__version__.partition("+")[0]
    assert {"transformers", "pyzmq", "boto3"} <= set(named)
    assert "ray" not in named


def test_the_lower_bound_is_the_version_that_is_still_allowed():
    requirements = ["a<6,>=4.56", "b==2", 'c[x]>=3; extra == "more"', 'd>=1; extra == "other"']
    assert list(lower_bounds(requirements, ["more"])) == ["a==4.56", "b==2", "c==3"]
    for without in ("a", "a<6", "a>5"):
        with pytest.raises(ValueError, match="no lower bound"):
            list(lower_bounds([without], []))
