"""The lines of a process's log, as text and as JSON, by processes that write them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from rows import each_row

TIME = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ")

PROGRAM = """
import logging, sys, threading, warnings
from tokasaurus.observability.logging import configure_logging
from tokasaurus.observability.request_names import about, serving
configure_logging("worker-1", "info", sys.argv[1])
log = logging.getLogger("tokasaurus.some.room")
log.debug("hidden")
log.info("loaded %d tensors", 3)
logging.getLogger("some_library").info("hidden, too")
logging.getLogger("some_library").warning("two\\nlines")
with serving("req_1"):
    log.warning("while it is served")
    log.warning("about another", extra=about("mine/7"))
    log.warning("request req_1 is named already")
log.info("answered", extra={"fields": {"status": 200, "path": object}})
log.error("another process ended", extra={"traceback": "Traceback of another process\\n"})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("an error with umlaut \\u00e4")
warnings.warn("old", DeprecationWarning, stacklevel=1)
library = logging.getLogger("library_with_a_handler")
library.addHandler(logging.StreamHandler())
library.propagate = False
library.warning("said by its handler")
sys.stderr.write("written in ")
print("two pieces", file=sys.stderr)
for percent in range(0, 101, 50):
    sys.stderr.write(f"\\rdone: {percent}%")
    sys.stderr.flush()
sys.stderr.write("\\n\\n")
log.info("no mapping key in %(this)s", 1)
configure_logging("worker-1", "info", sys.argv[1])  # once more
print("at last", file=sys.stderr)
thread = threading.Thread(target=lambda: [][1], name="lifeline")
thread.start()
thread.join()
raise KeyError("at the end")
"""


def lines_of(log_format):
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROGRAM, log_format],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()


def test_text_lines_have_date_level_process_and_request():
    lines = lines_of("text")
    dated = [TIME.sub("", line, count=1) for line in lines if TIME.match(line)]
    assert dated[:2] == [
        "INFO    worker-1 loaded 3 tensors",
        "WARNING worker-1 two",
    ]
    assert "WARNING worker-1 while it is served [request req_1]" in dated
    assert "WARNING worker-1 about another [request mine/7]" in dated
    assert "WARNING worker-1 request req_1 is named already" in dated
    assert "INFO    worker-1 answered" in dated
    assert "hidden" not in "\n".join(lines)
    ended = next(i for i, line in enumerate(lines) if line.endswith("another process ended"))
    assert lines[ended + 1] == "Traceback of another process"
    assert any(line.startswith("ZeroDivisionError") for line in lines)


def test_json_lines_are_objects_whatever_a_process_says():
    lines = [json.loads(line) for line in lines_of("json")]
    by_message = {line["message"]: line for line in lines}
    for line in lines:
        assert {"time", "level", "process", "pid", "logger", "message"} <= line.keys()
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["process"] == "worker-1"
    assert "request_id" not in by_message["loaded 3 tensors"]
    assert by_message["two\nlines"]["level"] == "WARNING"
    assert by_message["while it is served"]["request_id"] == "req_1"
    assert by_message["about another"]["request_id"] == "mine/7"
    assert by_message["answered"]["status"] == 200
    assert by_message["another process ended"]["traceback"].startswith("Traceback of another")
    assert by_message["an error with umlaut ä"]["traceback"].endswith("division by zero")
    assert any("DeprecationWarning: old" in message for message in by_message)
    printed = [line["message"] for line in lines if line["logger"] == "stderr"]
    assert printed[:3] == ["said by its handler", "written in two pieces", "done: 100%"]
    assert any("KeyError: 'this'" in line or "TypeError" in line for line in printed)
    assert printed[-1] == "at last"
    in_thread = by_message["the thread lifeline ended with an error"]
    assert "IndexError" in in_thread["traceback"]
    assert "KeyError: 'at the end'" in lines[-1]["traceback"]
    assert lines[-1]["level"] == "CRITICAL"


@each_row("level, shown", [("ERROR", 0), ("warning", 1), ("INFO", 2)])
def test_the_level_is_that_of_the_engine_s_own_lines(level, shown):
    program = (
        "import logging, sys\n"
        "from tokasaurus.observability.logging import configure_logging\n"
        f"configure_logging('server', {level!r})\n"
        "log = logging.getLogger('tokasaurus.x')\n"
        "log.info('a'); log.warning('b')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert len(done.stderr.splitlines()) == shown
