import io
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from tokasaurus.scripts import chat


def talk(monkeypatch, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return chat.main(arguments)


def test_a_conversation_through_a_pipe(engine, monkeypatch, capsys):
    assert talk(monkeypatch, "hello there\n\nand you\n", f"port={engine.port}") == 0
    assert capsys.readouterr().out == "hello~there~\nand~you~\n"
    assert [body["messages"] for _, body in engine.requests] == [
        [{"role": "user", "content": "hello there"}],
        [
            {"role": "user", "content": "hello there"},
            {"role": "assistant", "content": "hello~there~"},
            {"role": "user", "content": "and you"},
        ],
    ]
    assert "max_tokens" not in engine.requests[0][1]
    assert "temperature" not in engine.requests[0][1]


def test_flags_reach_the_request(engine, monkeypatch):
    arguments = ["system=(be brief)", "temperature=0.5", "max_tokens=9", "model=m"]
    assert talk(monkeypatch, "hi", f"port={engine.port}", *arguments) == 0
    body = engine.requests[0][1]
    assert body["messages"][0] == {"role": "system", "content": "(be brief)"}
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.5, 9, "m")


def test_slash_commands(engine, monkeypatch, capsys):
    lines = "a\n/reset\nb\n/system be kind\n/system\nc\n/help\n/nonsense\n/exit\nnever\n"
    assert talk(monkeypatch, lines, f"port={engine.port}") == 0
    sent = [[message["content"] for message in body["messages"]] for _, body in engine.requests]
    assert sent == [["a"], ["b"], ["be kind", "c"]]
    out, err = capsys.readouterr()
    assert out == "a~\nb~\nc~\n"
    assert "be kind" in err
    assert "/nonsense is not a command" in err


def test_a_pipe_ends_at_the_first_error(engine, monkeypatch, capsys):
    assert talk(monkeypatch, "too long\nnever\n", f"port={engine.port}") == 1
    assert "the prompt is too long" in capsys.readouterr().err
    assert len(engine.requests) == 1


def test_a_refused_message_is_forgotten(engine):
    client = chat.connect(chat.ChatConfig(port=engine.port))
    conversation = chat.Conversation(client, chat.ChatConfig(port=engine.port))
    with pytest.raises(chat.openai.BadRequestError):
        list(conversation.say("too long"))
    assert "".join(conversation.say("a")) == "a~"
    assert [m["content"] for m in engine.requests[1][1]["messages"]] == ["a"]


def test_an_interrupted_answer_stays_as_far_as_it_came(engine):
    client = chat.connect(chat.ChatConfig(port=engine.port))
    conversation = chat.Conversation(client, chat.ChatConfig(port=engine.port))
    answer = conversation.say("one two three")
    assert next(answer) == "one~"
    answer.close()
    list(conversation.say("go on"))
    sent = [message["content"] for message in engine.requests[1][1]["messages"]]
    assert sent == ["one two three", "one~", "go on"]


def test_chat_without_an_engine(closed_port, monkeypatch, capsys):
    assert talk(monkeypatch, "hi", f"port={closed_port}") == 1
    assert "nothing listens" in capsys.readouterr().err


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "tokasaurus.scripts.chat", *arguments]
        # A new session whose controlling terminal is this one, so that Ctrl-C reaches the command.
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._fd = ours
        self._seen = ""

    def wait_for(self, text):
        assert self._read_until(text, 120), f"waited for {text!r}, got {self._seen!r}"

    def interrupt_until(self, text):
        """Repeats Ctrl-C: readline ignores one that comes just before it waits."""
        for _ in range(120):
            self.process.send_signal(signal.SIGINT)
            if self._read_until(text, 1):
                return
        raise AssertionError(f"interrupted until {text!r}, got {self._seen!r}")

    def _read_until(self, text, timeout_s):
        while text not in self._seen:
            readable, _, _ = select.select([self._fd], [], [], timeout_s)
            if not readable:
                return False
            self._seen += os.read(self._fd, 4096).decode()
        self._seen = self._seen.split(text, 1)[1]
        return True

    def type(self, text):
        os.write(self._fd, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_a_conversation_in_a_terminal(engine):
    terminal = Terminal(f"port={engine.port}")
    try:
        terminal.wait_for("fake-model at 127.0.0.1")
        terminal.wait_for("> ")
        terminal.type("good day\n")
        terminal.wait_for("good~day~")
        terminal.wait_for("> ")
        terminal.type("too long\n")  # an error does not end it
        terminal.wait_for("the prompt is too long")
        terminal.wait_for("> ")
        terminal.interrupt_until("/exit ends")  # nor does Ctrl-C
        terminal.wait_for("> ")
        terminal.type("wait for me\n")
        terminal.wait_for("wait~")
        terminal.interrupt_until("(interrupted)")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(120) == 0
    finally:
        terminal.close()
