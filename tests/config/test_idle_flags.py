"""Flags that were set and change nothing on a device, as one line each reason."""

from __future__ import annotations

from rows import each_row

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.idle_flags import idle_flags
from tokasaurus.config.parser import parse_command_line

NO_GRAPHS = "device=cpu has no CUDA graphs"


@each_row(
    "flags, device, lines",
    [
        ({}, "cpu", ()),
        ({}, "cuda", ()),
        ({"use_cudagraphs": True}, "cuda", ()),
        ({"use_cudagraphs": True}, "cpu", (f"use_cudagraphs changes nothing: {NO_GRAPHS}",)),
        ({"use_cudagraphs": False}, "cpu", ()),
        (
            {"use_cudagraphs": True, "cudagraph_step": 8},
            "cpu",
            (f"use_cudagraphs and cudagraph_step change nothing: {NO_GRAPHS}",),
        ),
        (
            {"use_cudagraphs": False, "cudagraph_step": 8},
            "cuda",
            ("cudagraph_step changes nothing: use_cudagraphs=F",),
        ),
        ({"use_hydragen": True, "hydragen_min_group_size": 4}, "cpu", ()),
        ({"use_hydragen": True}, "cuda", ()),
        (
            {"use_hydragen": False, "hydragen_min_group_size": 4},
            "cpu",
            ("hydragen_min_group_size changes nothing: use_hydragen=F",),
        ),
    ],
)
def test_flags_that_change_nothing_are_named_with_the_reason(flags, device, lines):
    assert idle_flags(EngineConfig(**flags), device) == lines


def test_what_show_prints_sets_no_flag(capsys, tmp_path):
    """Its file has every flag, most of them as the user left them."""
    try:
        parse_command_line(["--show"], {})
    except SystemExit:
        path = tmp_path / "shown.yaml"
        path.write_text(capsys.readouterr().out)
    assert idle_flags(parse_command_line([f"config={path}"], {}), "cpu") == ()
