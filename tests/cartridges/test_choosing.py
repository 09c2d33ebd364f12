"""Which of several files is the cartridge."""

from __future__ import annotations

import pytest
from rows import check_each

from tokasaurus.cartridges.sources.choosing import choose_file, companion_of
from tokasaurus.cartridges.sources.source import SourceErrors
from tokasaurus.errors import RequestError

ERRORS = SourceErrors("huggingface", "owner/name")


def test_the_best_name_is_chosen():
    def check(row):
        names, chosen = row
        for order in (names, names[::-1]):
            assert choose_file(order, ERRORS, "name one") == chosen

    rows = [
        (["README.md", "anything.pt"], "anything.pt"),
        (["config.yaml", "x.safetensors"], "x.safetensors"),
        (["cache-step4092.pt", "README.md"], "cache-step4092.pt"),
        (["cache-step9.pt", "cache-step10.pt", "optimizer.pt"], "cache-step10.pt"),
        (["cache-epoch1.pt", "cache-epoch12.pt", "cache-epoch3.pt"], "cache-epoch12.pt"),
        (["cache-epoch9.pt", "cache-step1.pt"], "cache-step1.pt"),
        (["cache_last.pt", "cache-step100.pt"], "cache_last.pt"),
        (["cartridge.pt", "cache_last.pt"], "cartridge.pt"),
        (["cartridge.pt", "cartridge.safetensors"], "cartridge.safetensors"),
        (["a/cartridge.pt", "cartridge.pt"], "cartridge.pt"),
        (["a/cache-step7.pt", "cache-step3.pt"], "a/cache-step7.pt"),
        (["a/b/c.pt", "d.txt"], "a/b/c.pt"),
    ]
    check_each(rows, check)


def test_no_name_and_several_are_errors_that_say_what_is_there():
    def check(row):
        names, message = row
        with pytest.raises(RequestError, match=message) as caught:
            choose_file(names, ERRORS, "name one of them")
        assert caught.value.field == "cartridges"
        assert "cartridge 'owner/name' of source 'huggingface'" in caught.value.message

    rows = [
        ([], "no file there ends in .pt or .safetensors; it has no files"),
        (["a.txt", "b.bin"], "no file there ends in .pt or .safetensors; it has a.txt, b.bin"),
        (["a.pt", "b.pt"], "several files, a.pt, b.pt; name one of them"),
        ([f"{n}.pt" for n in range(9)], "0.pt, 1.pt, 2.pt, 3.pt, 4.pt and 4 more"),
    ]
    check_each(rows, check)


def test_the_companion_is_beside_the_file():
    assert companion_of("a.pt", ["a.pt", "config.yaml"]) == "config.yaml"
    assert companion_of("x/a.pt", ["x/a.pt", "config.yaml"]) is None
    assert companion_of("x/a.pt", ["x/a.pt", "x/config.yaml"]) == "x/config.yaml"
