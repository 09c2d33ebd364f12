from pathlib import Path

from tokasaurus.config.engine import ENGINE
from tokasaurus.config.reference import markdown, sections

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_configuration_page_is_current():
    command = "python -m tokasaurus.config.reference > docs/configuration.md"
    assert PAGE.read_text() == markdown(), f"write it again: {command}"


def test_every_flag_is_in_one_section():
    names = [row.name for section in sections(ENGINE) for row in section.rows]
    assert len(names) == len(set(names))
    assert set(names) == {*(flag.name for flag in ENGINE), *ENGINE.retired, "config"}


def test_every_table_row_has_all_columns():
    for line in markdown().splitlines():
        if line.startswith("|"):
            assert line.count(" | ") in (1, 3) or line.startswith("|---"), line
