"""The server's page in a real browser: Chromium without a screen, driven by Playwright, where both are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import uniql_jax
from tests import tiny
from uniql_jax.server.app import Server
from uniql_jax.server.http import Keys, Limits
from uniql_jax.server.running import serving

pytestmark = pytest.mark.slow
KEY = "a-key-of-the-tests"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as play:
        try:
            made = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(11))


@pytest.fixture
def server(folder: Path) -> Server:
    session = uniql_jax.Elastic(folder, context=200, batch=2)
    return Server(session, "tiny", limits=Limits(default_tokens=12), quality={0.0: 12.5, 0.1: 13.25})


def page_of(browser: Any, url: str, **options: Any) -> Any:
    """The page, which must not have logged anything but what a test provokes."""
    page = browser.new_context(**options).new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#model:text-is('tiny')", timeout=20_000)
    return page


def test_a_conversation_and_the_slider_by_keyboard(browser: Any, server: Server) -> None:
    with serving(server) as url:
        page = page_of(browser, url)
        assert page.locator("#model").text_content() == "tiny"
        assert page.locator("#perplexity").text_content() == "12.50"
        page.locator("#sampling summary").click()
        page.fill("#temperature", "0")
        page.fill("#tokens", "12")
        page.focus("#say")
        page.keyboard.type("the people")
        page.keyboard.press("Enter")
        page.wait_for_selector("#log .assistant footer", timeout=60_000)
        messages = [{"role": "user", "content": "the people"}]
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = tiny.CHAT_TEMPLATE
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        wanted = "".join(uniql_jax.generate(server.session.model, ids, tokenizer=tokenizer, max_new_tokens=12))
        assert page.locator("#log .assistant div").text_content() == wanted
        assert "12 tokens" in page.locator("#log .assistant footer").text_content()
        before = page.locator("#weights").text_content()
        page.focus("#rate")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        page.wait_for_selector("#perplexity:text-is('13.25')", timeout=60_000)
        assert server.session.rate == 0.1
        assert page.locator("#rate-value").text_content() == "10 %"
        assert page.locator("#weights").text_content() != before
        page.click("#reset")
        assert page.locator("#log li").count() == 0
        assert page.said == []


def test_stopping_an_answer(browser: Any, server: Server) -> None:
    with serving(server) as url:
        page = page_of(browser, url)
        page.locator("#sampling summary").click()
        page.fill("#tokens", "170")
        page.fill("#say", "hi")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:visible", timeout=20_000)
        page.keyboard.press("Escape")
        page.wait_for_selector("#log .assistant footer", timeout=60_000)
        for _ in range(100):
            if not server.streams:
                break
            page.wait_for_timeout(50)
        assert not server.streams
        assert page.locator("#send").is_enabled()


def test_what_goes_wrong_stays_to_be_read(browser: Any, server: Server) -> None:
    """An answer that cannot be had leaves no empty bubble, its text in the box, and its reason on the page."""
    with serving(server) as url:
        page = page_of(browser, url)
        page.locator("#sampling summary").click()
        page.fill("#tokens", "4096")
        page.fill("#say", "the people")
        page.press("#say", "Enter")
        page.wait_for_selector("#problem:visible", timeout=20_000)
        page.wait_for_timeout(2_000)  # longer than the page waits between looks at the server
        assert "context of 200" in page.locator("#problem").text_content()
        assert page.locator("#log li").count() == 0
        assert page.locator("#say").input_value() == "the people"
        page.fill("#tokens", "3")
        page.press("#say", "Enter")
        page.wait_for_selector("#log .assistant footer", timeout=60_000)
        assert page.locator("#problem").is_hidden()


def test_a_model_without_a_chat_template_goes_on_with_a_text(browser: Any, folder: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    tiny.tokenizer().save_pretrained(plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    server = Server(uniql_jax.Elastic(plain, context=200, batch=2), "tiny")
    with serving(server) as url:
        page = page_of(browser, url)
        page.locator("#sampling summary").click()
        page.fill("#temperature", "0")
        page.fill("#tokens", "12")
        page.fill("#say", "the people")
        page.press("#say", "Enter")
        page.wait_for_selector("#log .assistant footer", timeout=60_000)
        wanted = "".join(uniql_jax.generate(server.session.model, "the people", max_new_tokens=12))
        assert page.locator("#log .assistant div").text_content() == wanted


def test_a_key_is_asked_for(browser: Any, folder: Path) -> None:
    server = Server(uniql_jax.Elastic(folder, context=64), "tiny", keys=Keys(KEY))
    with serving(server) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key-form:visible", timeout=20_000)
        page.fill("#key", "wrong-key-wrong-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem:visible", timeout=20_000)
        page.wait_for_selector("#key-form:visible", timeout=20_000)
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:text-is('tiny')", timeout=20_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 700, 1280])
def test_every_screen(browser: Any, server: Server, width: int, scheme: str) -> None:
    """Nothing runs out of the page, and text is readable on what lies behind it."""
    with serving(server) as url:
        page = page_of(browser, url, viewport={"width": width, "height": 700}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("#say", "#send", "#rate", "#reset"):
            page.locator(name).scroll_into_view_if_needed()
            assert page.locator(name).is_visible()
        contrast = """(() => {
            const light = (color) => { const [r, g, b] = color.match(/[0-9.]+/g).map((v) => { v /= 255;
                return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const back = light(getComputedStyle(document.querySelector(".knob")).backgroundColor);
            return ["dt", "dd", "h2", ".note", "#reset"].map((name) => {
                const text = light(getComputedStyle(document.querySelector(name)).color);
                return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05); });
        })()"""
        assert min(page.evaluate(contrast)) >= 4.5
        unnamed = """[...document.querySelectorAll('input, textarea')].filter(
            (e) => !e.labels.length && !e.hasAttribute("aria-labelledby")).map((e) => e.id)"""
        assert page.evaluate(unnamed) == []
