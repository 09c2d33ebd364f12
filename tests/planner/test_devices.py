"""Devices: the table, its sources, and files of users."""

from __future__ import annotations

import pytest

from tokasaurus.errors import ConfigError
from tokasaurus.planner.devices import device_names, find_device

OWN = """
name: A board of ours
memory_gb: 64
read_gb_per_s: {value: 1000, data_sheet: "the board's"}
tflop_per_s: {bfloat16: 100}
"""


def own(tmp_path, text):
    path = tmp_path / "board.yaml"
    path.write_text(text)
    return find_device(str(path))


def error_of(name):
    with pytest.raises(ConfigError) as caught:
        find_device(name)
    return str(caught.value)


def test_every_number_of_the_table_has_a_source_and_a_plausible_size():
    assert {"h200", "h100", "a100-80gb", "a100-40gb", "l40s", "l4", "a10g", "b200"} <= set(
        device_names()
    )
    for name in device_names():
        device = find_device(name)
        for number, figure in device.figures.items():
            assert figure.source, (name, number)
        assert 20e9 <= device.memory_bytes <= 300e9, name
        # No device reads its whole memory in less than 20 ms, or needs more than 100 ms.
        assert 0.02 < device.memory_bytes / device.bytes_per_s < 0.1, name
        # Operations in the time in which a byte is read: what makes decoding bound by memory.
        assert 60 < device.flops_per_s("bfloat16") / device.bytes_per_s < 500, name
        assert device.can_be_joined, name


def test_what_was_measured_counts_in_full_and_promises_in_part():
    assert find_device("h200").bytes_per_s == 4300e9
    assert find_device("h100").bytes_per_s == pytest.approx(0.9 * 3350e9)
    # The same processor: measured on one, promised for the other.
    rates = [find_device(name).flops_per_s("bfloat16") for name in ("h200", "h100")]
    assert rates[0] == pytest.approx(rates[1], rel=0.01)


def test_names_are_read_in_any_case():
    assert find_device("H200") == find_device("h200")


def test_a_file_describes_a_device_and_its_plain_numbers_count_as_measured(tmp_path):
    device = own(tmp_path, OWN)
    assert device.name == "A board of ours"
    assert device.memory_bytes == 64e9
    assert device.bytes_per_s == pytest.approx(900e9)
    assert device.figures["memory_gb"].source.startswith("measured: by device=")
    assert device.kind == "cuda"
    assert not device.can_be_joined


def test_a_missing_rate_of_a_dtype_names_the_others(tmp_path):
    with pytest.raises(ConfigError, match=r"no rate of products in float16; set dtype to .*bfloat"):
        own(tmp_path, OWN).flops_per_s("float16")


def test_unknown_names_get_the_nearest_ones():
    assert "the nearest is h200. Known are b200, " in error_of("h20")
    assert "the nearest is a100-80gb or a100-40gb." in error_of("a100")
    assert error_of("cpu").startswith("device=cpu is not known. Known are b200, ")
    assert error_of("none/there.yaml") == "device=none/there.yaml: No such file or directory"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("memory_gb: 64", "memory_gb: none"), "`$.memory_gb`"),
        (("memory_gb: 64", "memory_gb: -64"), "memory_gb must be above 0, not -64"),
        (("name:", "nam:"), "unknown field `nam`"),
        (("data_sheet", "rumour"), "unknown field `rumour`"),
        (('data_sheet: "the board\'s"', "data_sheet: a, measured: b"), "needs one source"),
        (("tflop_per_s: {bfloat16: 100}", "tflop_per_s: {}"), "tflop_per_s needs a rate"),
        (("{bfloat16: 100}", "{bfloat16: [}"), "is not YAML"),
        (("name: A board of ours", "kind: tpu\nname: b"), "`$.kind`"),
    ],
)
def test_errors_of_a_file_name_the_field(tmp_path, change, words):
    with pytest.raises(ConfigError) as caught:
        own(tmp_path, OWN.replace(*change))
    assert words in str(caught.value)
    assert "board.yaml" in str(caught.value)
