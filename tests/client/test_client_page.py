"""The examples of docs/client.md print what the page says, and it names every method."""

from __future__ import annotations

import pytest
from documentation import ROOT, examples, mismatch, run_python

from tokasaurus.client import AsyncClient, Client
from tokasaurus.client.client import Batches, Cartridges, Files

PAGE = "docs/client.md"


@pytest.mark.engine
def test_examples_print_what_the_page_says(engine):
    namespace = {}
    wrong = []
    for example in examples(PAGE):
        assert example.language == "python"
        printed = run_python(example.at(engine.port), namespace)
        wrong.append(mismatch(example.printed or "", printed))
    assert len(wrong) > 7
    assert not any(wrong), "\n\n".join(filter(None, wrong))


def test_the_page_names_every_method():
    text = (ROOT / PAGE).read_text()
    kinds = (Client, AsyncClient, Batches, Cartridges, Files)
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    missing = sorted(name for name in names if name not in text)
    assert missing == []


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    for name in ("files", "batches", "cartridges"):
        with Client() as client:
            blocking, in_a_loop = getattr(client, name), getattr(client._async, name)
        assert methods(type(blocking)) == methods(type(in_a_loop))
