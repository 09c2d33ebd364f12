"""Configurations keep every key of YAML, or refuse it by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import tokasaurus.client.lm
from tokasaurus.client.lm import (
    LanguageModel,
    LMConfig,
    TokasaurusClient,
    TokasaurusConfig,
    get_lm_client,
    json_log_context,
)

CONFIGS = Path(tokasaurus.client.lm.__file__).parent / "configs"
GUIDE = """
agent:
  type: memoryless_agent
  lm_config:
    model: "toka:meta-llama/Llama-3.2-3B-Instruct"
    temperature: 0.0
    max_output_tokens: 8192
    log_calls: true
    # Tokasaurus-specific options
    base_url: "http://localhost:8080"
    protocol: "openai"  # or "toka" for native API
    stop_sequences: ["FEEDBACK", "OBSERVATION"]
"""


class AgentConfig(BaseModel):
    """An agent's program, which knows only the type that all language models share."""

    type: str
    lm_config: LMConfig


def test_defaults_are_those_that_programs_rely_on():
    config = TokasaurusConfig(model="m")
    assert config.model_dump(include=set(LMConfig.model_fields)) == {
        "model": "m",
        "temperature": 0.2,
        "train_temperature": None,
        "val_temperature": None,
        "max_output_tokens": 8192,
        "log_calls": False,
        "max_retries": 5,
        "starting_delay": 1.0,
        "backoff_factor": 2.0,
        "max_delay": 10.0,
    }
    assert config.base_url == "http://localhost:8080"
    assert config.protocol == "openai"
    assert config.api_key is None
    assert config.stop_sequences == ["FEEDBACK", "OBSERVATION"]
    assert config.timeout_s == 900.0
    assert config.enable_health_check is False
    assert config.on_failure == "return_empty"


def test_a_configuration_that_an_agents_type_has_read_keeps_the_clients_keys():
    read = yaml.safe_load(GUIDE)["agent"]
    read["lm_config"] |= {"base_url": "http://127.0.0.1:9", "protocol": "toka"}
    read["lm_config"] |= {"stop_sequences": ["END"], "max_retries": 0}
    agent = AgentConfig.model_validate(read)
    again = AgentConfig.model_validate_json(agent.model_dump_json())
    for lm_config in (read["lm_config"], agent.lm_config, again.lm_config):
        client = get_lm_client(lm_config)
        assert isinstance(client, TokasaurusClient)
        assert isinstance(client, LanguageModel)
        assert client.config is client.cfg
        assert client.cfg.model == "meta-llama/Llama-3.2-3B-Instruct"
        assert client.cfg.base_url == "http://127.0.0.1:9"
        assert client.cfg.protocol == "toka"
        assert client.cfg.stop_sequences == ["END"]
        assert client.cfg.max_retries == 0
        assert client.cfg.temperature == 0.0
        assert client.cfg.log_calls is True
        client.close()


def test_defaults_of_an_agents_own_type_reach_the_client():
    class Careful(LMConfig):
        temperature: float = 0.7
        max_retries: int = 1

    client = get_lm_client(Careful(model="toka:m", protocol="toka"))
    assert (client.cfg.temperature, client.cfg.max_retries) == (0.7, 1)
    assert client.cfg.starting_delay == 1.0
    assert client.cfg.protocol == "toka"


def test_the_shipped_files_have_the_guides_keys():
    (finer,) = CONFIGS.glob("finer/memoryless_toka_llama3b.yaml")
    guide = yaml.safe_load(GUIDE)["agent"]
    shipped = yaml.safe_load(finer.read_text())["agent"]
    assert shipped["type"] == guide["type"]
    assert shipped["lm_config"] == {**guide["lm_config"], "max_retries": 0}
    for path in CONFIGS.rglob("*.yaml"):
        get_lm_client(yaml.safe_load(path.read_text())["agent"]["lm_config"]).close()


WRONG = [
    ({"stop_sequence": ["END"]}, "'stop_sequence'", "did you mean 'stop_sequences'"),
    ({"top_k": 3}, "'top_k'", "extra_body"),
    ({"protocol": "grpc"}, "protocol", "'openai' or 'toka'"),
    ({"base_url": "ftp://localhost:8080"}, "base_url", "http://127.0.0.1:10210"),
    ({"base_url": "http://h?key=1"}, "base_url", "http://127.0.0.1:10210"),
    ({"base_url": ""}, "base_url", "at least 1 character"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_retries": -1}, "max_retries", "greater than or equal to 0"),
    ({"on_failure": "ignore"}, "on_failure", "'raise' or 'return_empty'"),
    ({"timeout_s": 0}, "timeout_s", "greater than 0"),
]


def test_what_is_wrong_is_named_with_a_remedy():
    for keys, name, remedy in WRONG:
        with pytest.raises(ValueError, match=name) as caught:
            get_lm_client({"model": "toka:m", **keys})
        assert remedy in str(caught.value), keys


def test_only_the_prefix_decides():
    assert get_lm_client({"model": "toka:google/gemini-like"}).cfg.model == "google/gemini-like"
    assert get_lm_client({"model": "toka:a:b"}).cfg.model == "a:b"
    for model in ("gpt-4", "gemini-pro", "tokamak", "", None):
        with pytest.raises(ValueError, match="toka:"):
            get_lm_client({"model": model})


def test_an_address_may_end_in_v1():
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert TokasaurusConfig(model="m", base_url=url).address.url == "http://h:1"
    assert TokasaurusConfig(model="m", base_url="https://h/a/v1").address.url == "https://h/a"


def test_the_environment_has_what_the_file_leaves_out(monkeypatch):
    monkeypatch.setenv("TOKASAURUS_BASE_URL", "http://h:1/v1")
    monkeypatch.setenv("TOKASAURUS_API_KEY", "first, second")
    config = TokasaurusConfig(model="m")
    assert (config.address.url, config.address.api_key) == ("http://h:1", "first")
    config = TokasaurusConfig(model="m", base_url="http://h:2", api_key="own")
    assert (config.address.url, config.address.api_key) == ("http://h:2", "own")
    assert "own" not in repr(config)


def test_errors_do_not_show_the_key():
    with pytest.raises(ValueError, match="stop_sequence") as caught:
        get_lm_client({"model": "toka:m", "api_key": "secret", "stop_sequence": "x"})
    assert "secret" not in str(caught.value)


def test_null_stands_for_none_of_them():
    config = TokasaurusConfig(model="m", stop_sequences=None, cartridges=None, extra_body=None)
    assert (config.stop_sequences, config.cartridges, config.extra_body) == ([], [], {})
    assert TokasaurusConfig(model="m", stop_sequences="END").stop_sequences == ["END"]


def test_the_mode_chooses_the_temperature():
    config = LMConfig(model="m", temperature=0.5, train_temperature=1.0, val_temperature=0.0)
    assert config.temperature_now() == 0.5
    for mode, expected in (("train", 1.0), ("val", 0.0), ("validation", 0.0), ("other", 0.5)):
        with json_log_context(mode=mode):
            assert config.temperature_now() == expected
    with json_log_context(mode="val"):
        assert LMConfig(model="m", temperature=0.5).temperature_now() == 0.5
