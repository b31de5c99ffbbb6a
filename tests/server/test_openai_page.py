"""The door's page in a real Chromium, streaming from a real Triton.

Run with: pytest tests/server/test_openai_page.py   (needs Debian's package chromium, or CHROMIUM=PATH)
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from door_process import door_process
from minitron_build.serving.triton_server import TritonServer
from minitron_client import MinitronClient

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KEY = "correct-horse-battery-staple"
PROMPT = "def add(a, b):"
PHONE = {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its sandbox needs privileges that a container lacks.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(running_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("door") / "keys"
    keys.write_text(KEY)
    with door_process(running_server.grpc_url, "--api-key-file", str(keys)) as door:
        yield door.url.removesuffix("v1")


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page with the key given; no request went elsewhere and nothing was complained of."""
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    expect(page.locator("#state")).to_have_text("ready")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#model option")).to_have_text("tensorrt_llm_bls")
    yield page
    context.close()
    assert {one for one in asked if not one.startswith((url, "data:"))} == set()
    assert [one for one in complaints if "the server responded with a status of 4" not in one] == []


def test_a_completion_streams_with_its_timings(page: Page, running_server: TritonServer) -> None:
    with MinitronClient(running_server.grpc_url) as client:
        expected = client.generate(PROMPT, max_tokens=40).text
    page.get_by_label("Text to go on from").fill(PROMPT)
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#reason")).to_have_text("length", timeout=20_000)
    assert page.locator("#text").text_content() == expected
    assert page.locator("#lead").text_content() == PROMPT
    expect(page.locator("#tokens")).to_have_text("40")
    for name in ("ttft", "speed", "total"):
        assert any(char.isdigit() for char in page.locator(f"#{name}").inner_text())
    expect(page.locator("#error")).to_be_hidden()


def test_it_is_used_without_a_mouse(page: Page) -> None:
    page.get_by_label("Text to go on from").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("ab")
    for label in ("Model", "Max tokens", "Temperature", "Top-p", "Seed", "Stop at", "API key"):
        page.keyboard.press("Tab")
        expect(page.get_by_label(label)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.get_by_label("Max tokens").fill("2000")
    page.get_by_label("Temperature").fill("0")  # at random this model ends a text after some hundred tokens
    page.keyboard.press("Control+Enter")
    expect(page.locator("#text")).not_to_be_empty(timeout=20_000)
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#reason")).to_have_text("you")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_an_error_is_shown(page: Page) -> None:
    page.get_by_label("Max tokens").fill("1000000")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("max_seq_len is 2048")


def test_text_is_text(page: Page) -> None:
    """A prompt with markup is shown, never run."""
    page.get_by_label("Text to go on from").fill("<img src=x onerror=alert(1)>")
    page.get_by_label("Max tokens").fill("2")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#lead")).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("#output img").count() == 0


def test_it_fits_a_phone(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.keyboard.press("Control+Enter")
    expect(page.locator("#reason")).to_have_text(re.compile("stop|length"), timeout=20_000)
    widest = page.evaluate("document.documentElement.scrollWidth")
    assert widest <= PHONE["width"]
    boxes = "[...document.querySelectorAll('dd, label')]"
    cut_off = f"{boxes}.filter((one) => one.scrollWidth > one.clientWidth).length"
    assert page.evaluate(cut_off) == 0
    for name in ("#go", "#halt"):
        box = page.locator(name).bounding_box()
        assert box is not None
        assert box["height"] >= 44  # a finger's size


def test_a_wrong_key_is_said(browser: Browser, url: str) -> None:
    page = browser.new_page()
    page.goto(url)
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("the API key is wrong")
    page.close()
