"""The page in a real browser, with a real engine: ``make test-browser``."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from conftest import Tab
from engine_process import running

pytestmark = [pytest.mark.browser, pytest.mark.engine]

PATIENCE_MS = 60_000
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
IGNORE = {"ignore_eos": True}


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


class Load:
    """Requests that run in the background; ``stop`` waits for their ends."""

    def __init__(self, engine, num_requests: int, num_tokens: int, **fields) -> None:
        self.answers: list[object] = []
        self._client = engine.client(timeout=120)
        self._threads = [
            threading.Thread(target=self._ask, args=(number, num_tokens, fields))
            for number in range(num_requests)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number, num_tokens, fields) -> None:
        asked = {"model": "m", "prompt": f"A B C D A B {number}", "max_tokens": num_tokens}
        extra = {**IGNORE, **fields}
        self.answers.append(self._client.completions.create(**asked, extra_body=extra))

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def test_live_numbers_move_and_the_forecast_is_drawn(page, small, pictures):
    load = Load(small, 12, 900, n=8)
    expect(page.locator("#figure-tokens_out")).not_to_have_text(
        re.compile(r"^\D*0?\D*$"), timeout=PATIENCE_MS
    )
    expect(page.locator("#limit")).to_contain_text("KV cache full", timeout=PATIENCE_MS)
    expect(page.locator("#limit")).to_contain_text("raise kv_cache_num_tokens from 4096 to")
    expect(page.locator("#backlog")).to_contain_text("Everything in flight ends in")
    chart = page.locator("#forecast svg.chart").first
    expect(chart).to_have_attribute("aria-label", re.compile("sequences of the queue begin"))
    expect(page.locator("#forecast path.all")).to_have_attribute("d", re.compile("^M.*L"))
    expect(page.locator("#forecast rect.admitted").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#request-table tbody tr")).not_to_have_count(0)
    before = page.locator("#figure-tokens_out").text_content()
    expect(page.locator("#figure-tokens_out")).not_to_have_text(before, timeout=PATIENCE_MS)
    page.wait_for_timeout(4000)
    page.screenshot(
        path=pictures / "page-now.png", clip={"x": 0, "y": 0, "width": 1100, "height": 860}
    )
    load.join()
    expect(page.locator("#limit")).to_contain_text("idle", timeout=PATIENCE_MS)


def test_dark_and_on_a_phone(browser, small, pictures):
    tab = Tab(
        browser,
        f"{small.url}/",
        viewport={"width": 390, "height": 844},
        color_scheme="dark",
        is_mobile=True,
        device_scale_factor=2,
    )
    expect(tab.page.locator("#status")).to_have_text("ok", timeout=PATIENCE_MS)
    load = Load(small, 6, 400, n=8)
    expect(tab.page.locator("#backlog")).to_contain_text("ends in", timeout=PATIENCE_MS)
    tab.page.wait_for_timeout(3000)
    tab.page.screenshot(path=pictures / "page-phone.png")
    width = tab.page.evaluate("document.documentElement.scrollWidth")
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    wide = tab.page.evaluate(
        "[...document.querySelectorAll('body *')].filter((each) => !each.closest('.wide')"
        " && each.getBoundingClientRect().right > 391).map((each) => each.outerHTML.slice(0, 90))"
    )
    load.join()
    tab.close()
    assert wide == []
    assert width <= 390  # nothing is wider than the phone
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60


def test_a_chat_streams_with_the_probabilities_of_its_tokens(page, pictures):
    page.fill("#prompt", "tell me a joke")
    page.fill("#samples", "2")
    page.fill("#seed", "7")
    page.click("#send")
    tokens = page.locator(".answer").first.locator(".token")
    expect(tokens.nth(3)).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#usage")).to_contain_text(
        "computed once for all 2 samples", timeout=PATIENCE_MS
    )
    expect(page.locator("#prompt-tokens.shared")).to_contain_text("tell me a joke")
    tokens.nth(1).hover()
    expect(page.locator("#token-card")).to_be_visible()
    expect(page.locator("#token-card")).to_contain_text("%")
    page.screenshot(path=pictures / "page-trial.png")
    # The next message goes on where the first sample ended, and finds its beginning in the cache.
    said = page.locator(".message p").last.text_content()
    assert said
    assert "<|" not in said
    page.fill("#prompt", "another one, " * 8)
    page.fill("#samples", "1")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".message")).to_have_count(4, timeout=PATIENCE_MS)
    page.click("#forget")
    expect(page.locator(".message")).to_have_count(0)


def test_the_cached_part_of_a_prompt_is_marked(page):
    prompt = "A B C D " * 20
    for _ in range(2):
        page.get_by_label("Completion", exact=True).check()
        page.fill("#prompt", prompt)
        page.fill("#max-tokens", "4")
        page.click("#send")
        expect(page.locator("#usage")).to_contain_text("4 tokens generated", timeout=PATIENCE_MS)
        expect(page.locator("#send")).to_be_enabled()
    cached = page.locator("#prompt-tokens:not(.shared) .cached")
    expect(cached).to_contain_text("A B C D")
    expect(page.locator("#usage")).not_to_contain_text("of which 0 were found")


def test_a_hostile_answer_stays_text(page):
    """The grammar makes the model say it."""
    models = {"object": "list", "data": [{"id": HOSTILE}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    page.locator("summary", has_text="Structured output").click()
    page.fill("#schema", json.dumps({"enum": [HOSTILE]}))
    page.fill("#prompt", HOSTILE)
    page.fill("#max-tokens", "400")
    for probabilities in (True, False):
        page.get_by_label("Probabilities").set_checked(probabilities)
        page.fill("#prompt", HOSTILE)
        page.click("#send")
        expect(page.locator(".answer")).to_contain_text("<img src=x", timeout=PATIENCE_MS)
        expect(page.locator("#send")).to_be_enabled(timeout=PATIENCE_MS)
    expect(page.locator("#conversation")).to_contain_text("<script>")
    expect(page.locator("body img, body script")).to_have_count(0)
    expect(page.locator("#model")).to_have_text(HOSTILE)
    assert page.title().endswith("Tokasaurus")


def test_a_problem_is_said_in_the_engines_words(tab):
    page = tab.page
    page.fill("#prompt", "hello")
    page.fill("#max-tokens", "100000")
    page.click("#send")
    expect(page.locator("#trial-problem")).to_contain_text("max_tokens", timeout=PATIENCE_MS)
    expect(page.locator("#send")).to_be_enabled()
    tab.problems[:] = [each for each in tab.problems if "400 (Bad Request)" not in each]


def test_a_batch_is_uploaded_watched_and_downloaded(page, tmp_path: Path):
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"A B C D {number}", "max_tokens": 8, "model": "m"},
        }
        for number in range(5)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    page.set_input_files("#upload-file", file)
    page.select_option("#upload-endpoint", "/v1/completions")
    page.get_by_role("button", name="Upload and start").click()
    expect(page.locator("#upload-state")).to_contain_text("has begun", timeout=PATIENCE_MS)
    row = page.locator("#batch-table tbody tr").first
    expect(row).to_contain_text("completed", timeout=PATIENCE_MS)
    expect(row).to_contain_text("5 of 5")
    with page.expect_download() as download:
        row.get_by_role("button", name=re.compile("^Download the output")).click()
    answers = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {line["custom_id"] for line in lines}


def test_a_request_is_cancelled(page, small):
    load = Load(small, 1, 2000, n=60, user=HOSTILE)
    row = page.locator("#request-table tbody tr").first
    expect(row).to_contain_text("<img src=x", timeout=PATIENCE_MS)
    row.get_by_role("button", name=re.compile("^Cancel request")).click()
    load.join()
    assert "abort" in {choice.finish_reason for choice in load.answers[0].choices}
    expect(page.locator("#request-table tbody tr")).to_have_count(0, timeout=PATIENCE_MS)


def test_a_stream_that_nobody_reads_further_gives_its_connection_back(page):
    """A browser has six connections to an engine: without them nothing else would come."""
    found = page.evaluate(
        """async () => {
            const { ask, events } = await import("/page/engine.js");
            for (let count = 0; count < 8; count += 1) {
                for await (const event of events(await ask("v1/engine/events"))) break;
            }
            return (await ask("v1/models")).status;
        }"""
    )
    assert found == 200


def test_everything_has_a_name_and_is_reached_by_keyboard(page):
    expect(page.locator("#status")).to_have_text("ok", timeout=PATIENCE_MS)
    named = page.locator("body").aria_snapshot()
    roles = "button|textbox|combobox|spinbutton|checkbox|radio|link|table|img|progressbar"
    nameless = re.findall(rf"^\s*- (?:{roles})(?::.*)?$", named, re.MULTILINE)
    assert nameless == [], named
    reached = []
    page.keyboard.press("Tab")
    for _ in range(60):
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        page.keyboard.press("Tab")
    wanted = ["Skip to the content", "upload-file", "upload-endpoint", "system", "prompt"]
    wanted += ["temperature", "top-p", "max-tokens", "samples", "seed", "probabilities", "send"]
    places = [reached.index(each) for each in wanted]
    assert places == sorted(places)


def test_a_locked_engine_asks_for_a_key_which_stays_in_the_tab(browser, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("sk-of-the-test\n")
    with running(tmp_path, f"api_key_file={key}", "uvicorn_log_level=warning") as engine:
        tab = Tab(browser, f"{engine.url}/")
        page = tab.page
        expect(page.locator("#door")).to_be_visible(timeout=PATIENCE_MS)
        page.get_by_role("textbox", name="This engine needs an API key").fill("sk-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#door-problem")).to_contain_text("wrong", timeout=PATIENCE_MS)
        page.get_by_role("textbox", name="This engine needs an API key").fill("sk-of-the-test")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("ok", timeout=PATIENCE_MS)
        expect(page.locator("#door")).to_be_hidden()
        page.reload()
        expect(page.locator("#status")).to_have_text("ok", timeout=PATIENCE_MS)
        other = tab.context.new_page()
        other.goto(f"{engine.url}/")
        expect(other.locator("#door")).to_be_visible(timeout=PATIENCE_MS)
        # The browser itself reports refusals.
        tab.problems[:] = [each for each in tab.problems if "401 (Unauthorized)" not in each]
        tab.close()


def test_the_api_document_is_readable(browser, small):
    tab = Tab(browser, f"{small.url}/docs")
    tab.address = f"{small.url}/"
    tab.page.locator("summary", has_text="POST /v1/chat/completions").first.click()
    expect(tab.page.locator("details[open] pre").first).to_be_visible()
    tab.close()


@pytest.mark.parametrize("flag", ["server_processes=2", "dp_size=2"])
def test_several_processes_or_replicas(browser, tmp_path: Path, flag):
    flags = (flag, "kv_cache_num_tokens=4096", "cpu_threads=1", "uvicorn_log_level=warning")
    with running(tmp_path, *flags) as engine:
        tab = Tab(browser, f"{engine.url}/")
        load = Load(engine, 8, 400, n=8)
        expect(tab.page.locator("#forecast path.all")).to_be_visible(timeout=PATIENCE_MS)
        expect(tab.page.locator("#request-table tbody tr")).not_to_have_count(0)
        if flag.startswith("dp_size"):
            expect(tab.page.locator("#replica option")).to_have_count(2, timeout=PATIENCE_MS)
        load.join()
        tab.close()
