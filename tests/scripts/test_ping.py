import subprocess
import sys

import pytest
from rows import each_row

from tokasaurus.scripts import ping


def run(engine, *arguments):
    return ping.main([*arguments, f"port={engine.port}"])


def test_ping_sends_a_completion(engine, capsys):
    assert run(engine, "prompt=tell me a joke") == 0
    out, err = capsys.readouterr()
    assert out == "tell me a joke!0\n"
    assert err.startswith("[7 tokens in ")
    path, body = engine.requests[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "default",
        "prompt": "tell me a joke",
        "max_tokens": 100,
        "n": 1,
        "temperature": 0.0,
    }


def test_the_documented_command_sends_a_chat(engine, capsys):
    assert run(engine, "prompt=tell me a joke", "max_tokens=256", "chat=True") == 0
    assert capsys.readouterr().out == "tell me a joke!0\n"
    path, body = engine.requests[0]
    assert path == "/v1/chat/completions"
    assert body["max_tokens"] == 256
    assert body["messages"] == [{"role": "user", "content": "tell me a joke"}]


@each_row("prompt", ["(tell me)", "[INST] hi [/INST]", "123", "None", "a=b", "'q'"])
def test_the_prompt_is_sent_unchanged(engine, prompt):
    assert run(engine, f"prompt={prompt}", "model=m") == 0
    assert engine.requests[-1][1]["prompt"] == prompt
    assert engine.requests[-1][1]["model"] == "m"


@pytest.mark.parametrize("chat", ["T", "F"])
def test_a_stream_is_printed(engine, capsys, chat):
    assert run(engine, "prompt=one two", "stream=T", f"chat={chat}") == 0
    out, err = capsys.readouterr()
    assert out == "one~two~\n"
    assert err.startswith("[9 tokens in ")
    assert engine.requests[0][1]["stream"] is True


@pytest.mark.parametrize(
    ("stream", "out"),
    [
        ("F", "--- sample 0\na!0\n--- sample 1\na!1\n"),
        ("T", "a~\n--- sample 1\na~\n"),
    ],
)
def test_several_samples_are_printed(engine, capsys, stream, out):
    assert run(engine, "prompt=a", "n=2", "temperature=0.5", f"stream={stream}") == 0
    got, err = capsys.readouterr()
    assert got == out
    assert err.startswith("[2 samples, ")
    assert engine.requests[0][1]["temperature"] == 0.5


@pytest.mark.parametrize("stream", ["F", "T"])
def test_hide_prints_no_text(engine, capsys, stream):
    assert run(engine, "prompt=a", "hide=T", f"stream={stream}") == 0
    out, err = capsys.readouterr()
    assert out.strip() == ""
    assert "tokens in" in err


def test_failures_are_retried(engine, capsys):
    engine.refusals = 1
    assert run(engine, "prompt=a") == 1
    assert "status 503: still loading" in capsys.readouterr().err
    engine.refusals = 1
    assert run(engine, "prompt=a", "retries=1") == 0


def test_ping_without_an_engine(closed_port, capsys):
    assert ping.main(["prompt=a", f"port={closed_port}"]) == 1
    err = capsys.readouterr().err
    assert f"nothing listens at http://127.0.0.1:{closed_port}" in err
    assert "toka" in err


def test_a_refusal_is_reported(engine, capsys):
    assert run(engine, "prompt=too long") == 1
    assert capsys.readouterr().err == (
        "toka-ping: error: the engine answered with status 400: the prompt is too long\n"
    )


@each_row(
    "arguments, words",
    [
        ([], ["prompt is required"]),
        (["prompt=a", "max_token=3"], ["max_token", "nearest", "max_tokens"]),
        (["prompt=a", "n=0"], ["n=0", "at least 1"]),
        (["hello"], ["prompt=hello"]),
    ],
)
def test_wrong_arguments_are_reported(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        ping.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("toka-ping: error: ")
    assert all(word in err for word in words)


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        ping.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "prompt=REQUIRED" in out
    assert "port=10210" in out


def test_ping_as_a_program(engine):
    command = [sys.executable, "-m", "tokasaurus.scripts.ping", "prompt=a", f"port={engine.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, "a!0\n")


def test_proxies_and_openai_keys_of_the_environment_are_ignored(engine, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run(engine, "prompt=a") == 0
