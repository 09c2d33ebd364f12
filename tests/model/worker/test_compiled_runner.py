"""torch.compile gives the tokens of the plain runner, and compiles nothing after the warm-up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rows import named
from worker_driver import generate, make_driver

from tokasaurus.errors import ConfigError
from tokasaurus.model.worker.worker import Worker


def make_compiled(path, linear, **options):
    driver = make_driver(
        path, linear=linear, torch_compile=True, torch_compile_config=json.dumps(options)
    )
    driver.worker.warm_up()
    return driver


def check_tokens(make_path, options):
    for architecture, linear in (("llama", "plain"), ("llama", "packed"), ("qwen3", "packed")):
        path = make_path(architecture, tied=True)
        plain, compiled = make_driver(path), make_compiled(path, linear, **options)
        with named(f"{architecture}, {linear}"):
            # Chunks of one row, of two, and of more, before steps of one row.
            for length, chunk in ((1, 1), (2, 2), (40, 17), (64, 64), (3, 1)):
                prompt = list(range(5, 5 + length))
                expected, _ = generate(plain, prompt, 6, chunk=chunk)
                tokens, _ = generate(compiled, prompt, 6, chunk=chunk)
                assert tokens == expected, (length, chunk)
            assert compiled.worker._runner.num_recompiles == 0


def test_a_traced_model_gives_the_same_tokens_and_is_not_traced_again(checkpoint):
    """With torch's backend that traces but compiles nothing, which takes seconds."""
    check_tokens(checkpoint, {"backend": "eager"})


@pytest.mark.long
def test_a_compiled_model_gives_the_same_tokens_and_is_not_compiled_again(checkpoint):
    check_tokens(checkpoint, {})


def test_a_graph_that_is_compiled_after_the_warm_up_is_counted(checkpoint):
    # A shape of its own: a model of a known shape takes that one's graph.
    path = checkpoint("llama", hidden_size=48, head_dim=20)
    tracing = json.dumps({"backend": "eager"})
    driver = make_driver(path, torch_compile=True, torch_compile_config=tracing)
    driver.worker._runner.warmed_up()  # without any batch
    generate(driver, [5, 6, 7], 2)
    assert driver.worker._runner.num_recompiles > 0


def test_arguments_that_torch_does_not_know_are_refused_by_name(checkpoint):
    for options in ({"modus": 1}, {"mode": "fastest"}, {"backend": "nothing"}):
        config = make_driver(checkpoint()).config
        with named(options), pytest.raises(ConfigError, match="torch_compile_config="):
            Worker(replace(config, torch_compile=True, torch_compile_config=json.dumps(options)))
