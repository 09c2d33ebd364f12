"""What docs/coming_from_other_engines.md names exists, and what is refused there is refused."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from documentation import ROOT, examples, mismatch, run_python

from tokasaurus import LLM, SamplingParams
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.other_engines import OTHER_ENGINES
from tokasaurus.config.schema import flags_of

sys.path.insert(0, str(Path(__file__).parent / "server"))

from peer_fields import PEER_REQUESTS

PAGE = "docs/coming_from_other_engines.md"
NAME = re.compile(r"`([^`]+)`")


def rows(section):
    """The cells of the rows of a section's table, without its head."""
    text = (ROOT / PAGE).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def tables(section):
    """The rows of each table of a section, without their heads: flags, routes, fields."""
    text = (ROOT / PAGE).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    flags, routes, fields = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in (flags, routes, fields)
    ]


def names(cell):
    return NAME.findall(cell)


def peer_fields(peer):
    return {
        name
        for kind, request in PEER_REQUESTS.items()
        if kind.startswith(peer)
        for name in (*request.base, *request.defaults)
    }


def test_flags_exist():
    flags = {flag.name for flag in flags_of(EngineConfig).values()}
    assert len(rows("Flags")) > 30
    wrong = [name for row in rows("Flags") for name in names(row[2]) if name not in flags]
    assert wrong == []
    of_others = [name for row in rows("Flags") for cell in row[:2] for name in names(cell)]
    assert [name for name in of_others if not name.startswith("--")] == []


def test_the_command_line_says_the_same_of_flags_of_other_engines():
    """It explains them in its errors, unless their name is one of ours."""
    flags = {flag.name for flag in flags_of(EngineConfig).values()}
    llama_cpp, _, _ = tables("llama.cpp")
    pairs = [(row[:-2], names(row[-2])) for row in [*rows("Flags"), *llama_cpp]]
    wrong = []
    for theirs, ours in pairs:
        for name in names(" ".join(theirs)):
            plain = name.lstrip("-").replace("-", "_")
            known = OTHER_ENGINES.get(plain)
            if plain not in flags and (known is None or known.ours not in ours):
                wrong.append((name, ours, known))
    assert not wrong, f"the page and tokasaurus/config/other_engines.py differ: {wrong}"


@pytest.mark.engine
def test_routes_exist(engine):
    """Of the three columns: a route of others that is named is served here, too."""
    with urllib.request.urlopen(f"{engine.url}/openapi.json") as answer:
        paths = set(json.load(answer)["paths"])
    assert len(rows("Routes")) > 15
    named = {name for row in rows("Routes") for cell in row for name in names(cell)}
    routes = {name for name in named if name.startswith("/")}
    assert sorted(routes - paths) == []


@pytest.mark.engine
def test_fields_exist(engine):
    with urllib.request.urlopen(f"{engine.url}/openapi.json") as answer:
        schemas = json.load(answer)["components"]["schemas"]
    ours = {name for schema in schemas.values() for name in schema.get("properties", {})}
    table = rows("Fields of requests")
    assert len(table) > 8
    for what, vllm, sglang, here in table:
        assert [name for name in names(vllm) if name not in peer_fields("vLLM")] == [], what
        assert [name for name in names(sglang) if name not in peer_fields("SGLang")] == [], what
        known = [name for name in names(here) if not name.startswith("/")]
        assert [name for name in known if name not in {*ours, "system_fingerprint"}] == [], what
    text = (ROOT / PAGE).read_text()
    listed = text.split("Those of OpenAI, and")[1].split("mean the same")[0]
    for name in names(listed):
        assert name in ours, name
        assert name in peer_fields("vLLM"), name


def test_flags_exist_that_stand_for_those_of_llama_cpp_and_ollama():
    flags = {flag.name for flag in flags_of(EngineConfig).values()}
    for section in ("llama.cpp", "Ollama"):
        table, _, _ = tables(section)
        assert len(table) > 5
        assert [name for row in table for name in names(row[1]) if name not in flags] == []


@pytest.mark.engine
def test_routes_exist_that_stand_for_those_of_llama_cpp_and_ollama(engine):
    with urllib.request.urlopen(f"{engine.url}/openapi.json") as answer:
        paths = set(json.load(answer)["paths"])
    for section in ("llama.cpp", "Ollama"):
        _, table, _ = tables(section)
        assert len(table) > 5
        named = {name for row in table for name in names(row[1]) if name.startswith("/")}
        assert sorted(named - paths) == []


@pytest.mark.engine
def test_fields_exist_or_are_refused_as_the_page_says(engine):
    with urllib.request.urlopen(f"{engine.url}/openapi.json") as answer:
        schemas = json.load(answer)["components"]["schemas"]
    ours = {name for schema in schemas.values() for name in schema.get("properties", {})}
    for section in ("llama.cpp", "Ollama"):
        _, _, table = tables(section)
        assert len(table) > 4
        for theirs, here in table:
            if here.startswith("refused"):
                for name in names(theirs):
                    assert name in refusal(engine, {name: 1}), name
            else:
                assert names(here), here
                assert [name for name in names(here) if name not in ours] == []


def refusal(engine, fields):
    """What an engine answers to a request for a completion that it refuses."""
    body = json.dumps({"prompt": "A", "max_tokens": 1, **fields}).encode()
    request = urllib.request.Request(
        f"{engine.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    return refused.value.read().decode()


def test_methods_exist():
    listed = (ROOT / PAGE).read_text().split("```\n\n`generate`")[1].split("are methods of")[0]
    assert [name for name in names(f"`generate`{listed}") if not hasattr(LLM, name)] == []
    assert SamplingParams.__dataclass_fields__.keys() >= {"temperature", "max_tokens"}


@pytest.mark.engine
def test_the_example_prints_what_the_page_says():
    (example,) = [each for each in examples(PAGE) if each.language == "python"]
    assert not mismatch(example.printed, run_python(example.program, {}))
