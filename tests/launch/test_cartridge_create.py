"""Cartridges of texts: what the engine makes, and what transformers makes, stand for the text.

The oracle is transformers in fp32, reading the whole prompt. Behind a cartridge of its first tokens
the rest gets the same logprobs to 1e-5, which a position that is off by one would miss by far.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ARCHITECTURES, BOS, make_checkpoint, make_tokenizer
from oracle import reference_cache, reference_logits, reference_model
from rows import check_each, named
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from worker_driver import Enter, make_driver

from tokasaurus.cartridges.reading import read_cartridge
from tokasaurus.config.parser import parse
from tokasaurus.launch.cartridges import create
from tokasaurus.launch.cartridges.main import main
from tokasaurus.model.facts import model_shape
from tokasaurus.protocol.commands import WriteCartridge

TOLERANCE = 1e-5
BOS_ID = 256
TEXT = "The stegosaurus kept its plates in the kitchen, where they belonged. Näturally, no fork."


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By architecture, with tokenizers that begin a prompt with BOS."""
    made = {
        name: make_checkpoint(tmp_path_factory.mktemp(name), name, rope=rope)
        for name, rope in zip(ARCHITECTURES, ("llama3", "default", "yarn"), strict=True)
    }
    for model in made.values():
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
        )
        tokenizer.save(str(model / "tokenizer.json"))
    return made


def ids_of(text: str) -> list[int]:
    """With one token for each byte, and BOS, which a cartridge begins with."""
    return [BOS_ID, *make_tokenizer().encode(text, add_special_tokens=False)]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def made(text: Path, model: Path, out: Path, *flags: str) -> Path:
    common = ("dtype=float32", "kv_cache_num_tokens=1024", "cpu_threads=1")
    assert run("create", "--text", text, f"model={model}", f"out={out}", *common, *flags) == 0
    return out


def behind(model: Path, cartridge: Path, ids: list[int], num_tokens: int) -> tuple[list, int]:
    """The logprobs of all ids but the first behind a cartridge, and of the token drawn then."""
    driver = make_driver(model)
    pages = np.array(driver.free[: -(-num_tokens // driver.config.page_size)], np.int32)
    answer = driver.control(WriteCartridge((str(cartridge),), num_tokens, pages))
    assert answer.error is None
    driver.start(0, num_logprobs=0)
    result = driver.step(prefill=[Enter(0, ids, num_tokens, num_prompt_logprobs=0)])
    return [*result.prompt_logprobs.tolist(), float(result.logprobs[0])], int(result.token_ids[0])


def check_golden(model: Path, cartridge: Path, ids: list[int], num_tokens: int) -> None:
    found, drawn = behind(model, cartridge, ids[num_tokens:], num_tokens)
    logits = reference_logits(model, ids, [drawn])
    with torch.inference_mode():
        whole = reference_model(model)(torch.tensor([ids])).logits[0]
    assert int(logits[-1].argmax()) == drawn
    wanted = [*ids[num_tokens + 1 :], drawn]
    expected = torch.log_softmax(whole[num_tokens:], 1)[range(len(wanted)), wanted]
    assert found == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_a_created_cartridge_stands_for_the_text(text, models, tmp_path):
    ids = ids_of(TEXT)
    assert len(ids) > 80
    for name, model in models.items():
        for num_tokens in (1, 16, 21, 33):
            with named((name, num_tokens)):
                out = made(text, model, tmp_path / "c.safetensors", f"num_tokens={num_tokens}")
                check_golden(model, out, ids, num_tokens)


def past(model: Path, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What transformers keeps of a text, for each layer [1, kv_heads, tokens, head_dim]."""
    cache = reference_cache(model, ids)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def test_a_trainers_cartridge_stands_for_the_text(models, tmp_path):
    """From transformers to ``torch.save`` to our file to the worker."""
    ids = ids_of(TEXT)
    for name, model in models.items():
        layers = past(model, ids[:21])
        saved = {
            f"{part}_{kind}": torch.nn.ParameterList(
                torch.nn.Parameter(layer[index][:, :, where]) for layer in layers
            )
            for part, where in (("frozen", slice(0, 1)), ("trainable", slice(1, None)))
            for index, kind in enumerate(("keys", "values"))
        }
        torch.save(saved, tmp_path / f"{name}.pt")

    async def read_all():
        return await asyncio.gather(
            *(read_cartridge(tmp_path / f"{name}.pt", tmp_path / name) for name in models)
        )

    for (name, model), metadata in zip(models.items(), asyncio.run(read_all()), strict=True):
        with named(name):
            assert (metadata.num_tokens, metadata.num_frozen) == (21, 1)
            check_golden(model, tmp_path / name, ids, 21)


def test_a_created_cartridge_has_the_numbers_of_transformers(text, models, tmp_path):
    """However the text is cut into batches, and the cache into pages."""
    ids = ids_of(TEXT)[:77]

    def check(row):
        name, flags = row
        out = made(text, models[name], tmp_path / "c.safetensors", "num_tokens=77", *flags)
        found = load_file(out)
        for layer, (keys, values) in enumerate(past(models[name], ids)):
            for kind, tensor in (("keys", keys), ("values", values)):
                torch.testing.assert_close(
                    found[f"{kind}.{layer}"], tensor[0].transpose(0, 1), atol=TOLERANCE, rtol=0
                )

    check_each(
        [
            ("llama", ()),
            ("llama", ("max_tokens_per_forward=32", "page_size=16", "max_seqs_per_forward=8")),
            ("qwen3", ("max_tokens_per_forward=20", "page_size=16", "max_seqs_per_forward=8")),
            ("qwen2", ("page_size=128",)),
            ("qwen2", ("attention=reference", "linear=plain")),
        ],
        check,
    )


def test_a_created_cartridge_says_what_it_is_for(text, models, tmp_path, capsys):
    model = models["qwen3"]
    out = made(text, model, tmp_path / "c.safetensors", "dtype=bfloat16")
    shape = model_shape(model, str(model))
    metadata = asyncio.run(read_cartridge(out, tmp_path / "again"))
    assert metadata.shape == shape
    assert (metadata.num_tokens, metadata.dtype) == (len(ids_of(TEXT)), "BF16")
    assert len(metadata.tokenizer) == 64
    assert f"{metadata.num_tokens} positions" in capsys.readouterr().out
    assert run("verify", out, f"model={model}") == 0
    assert run("verify", out, f"model={models['qwen2']}") == 1
    assert "are rotated with other parameters" in capsys.readouterr().err
    scaled = 'rope_scaling={"rope_type": "linear", "factor": 2.0}'
    assert run("verify", out, f"model={model}", scaled) == 1


def test_a_cartridge_may_begin_without_special_tokens(text, models, tmp_path):
    out = made(text, models["llama"], tmp_path / "c.safetensors", "special_tokens=F")
    keys = past(models["llama"], ids_of(TEXT)[1:])[0][0]
    found = load_file(out)["keys.0"]
    torch.testing.assert_close(found, keys[0].transpose(0, 1), atol=TOLERANCE, rtol=0)


def test_what_cannot_be_created_is_refused(text, models, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "long").write_text("x" * 600)
    model, out = f"model={models['llama']}", f"out={tmp_path / 'c.safetensors'}"
    rows = [
        (("text=absent", model, out), "text=absent cannot be read: No such file"),
        ((f"text={tmp_path / 'latin'}", model, out), "is not in UTF-8: byte 3"),
        ((f"text={text}", model, "out=c.bin"), "out=c.bin: the name must end in .safetensors"),
        ((f"text={text}", model, f"out={tmp_path}/x/c.safetensors"), "there is no directory"),
        ((f"text={text}", model, out, "num_tokens=1000"), "the text has 90 tokens"),
        (
            (f"text={tmp_path / 'empty'}", model, out, "special_tokens=F"),
            "empty has no tokens",
        ),
        ((f"text={tmp_path / 'long'}", model, out), "has 601 tokens, and a request of .* 512 with"),
        ((f"text={text}", model, out, "dp_size=2"), "leave dp_size, pp_size, tp_size"),
        ((f"text={text}", "model=/absent", out), "model=/absent"),
    ]

    def check(row):
        words, says = row
        assert run("create", *words, "kv_cache_num_tokens=1024") in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("toka-cartridge create: error: ")
        assert re.search(says, err), err
        assert not (tmp_path / "c.safetensors").exists()

    check_each(rows, check)


def test_flags_are_read_in_both_ways():
    expected = parse(create.SCHEMA, ["text=a", "out=b", "model=c"])
    assert parse(create.SCHEMA, ["--text", "a", "--out=b", "--model", "c"]) == expected
