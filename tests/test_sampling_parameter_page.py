"""docs/adding_a_sampling_parameter.md names all places that a sampling parameter has."""

from __future__ import annotations

import dataclasses
import re

from documentation import ROOT

from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.protocol.messages import SAMPLING_NUMBERS
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.text.params import SamplingParams

PAGE = ROOT / "docs" / "adding_a_sampling_parameter.md"
# It compares names with those of other engines, as far as they differ; a test of its own checks it.
COMPARISON = ROOT / "docs" / "coming_from_other_engines.md"
MAX_PLACES = 7


def places_on_the_page() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE))


def files_that_name(parameter: str) -> set[str]:
    paths = [*(ROOT / "tokasaurus").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    word = re.compile(rf"\b{parameter}\b")
    return {
        str(path.relative_to(ROOT))
        for path in paths
        if path not in (PAGE, COMPARISON) and word.search(path.read_text())
    }


def test_the_page_names_the_places_of_a_filter():
    assert files_that_name("min_p") == places_on_the_page()
    assert len(places_on_the_page()) <= MAX_PLACES


def test_the_names_on_the_page_are_in_its_files():
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| `([^`]+\.py)` \| (.*) \|$", line):
            text = (ROOT / match[1]).read_text()
            for name in re.findall(r"`(\w+)`", match[2]):
                assert re.search(rf"\b{name}\b", text), f"{match[1]} has no {name}"


def test_a_number_of_sampling_has_one_name_everywhere():
    neutral = SamplingParameters.neutral(2)
    params = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name, default in SAMPLING_NUMBERS.items():
        assert neutral[name].tolist() == [default] * 2, name
        assert params[name] is None, name
        assert name in GenerationRequest.model_fields, name
