"""The page at `/`: it needs nothing from outside, and in a browser it does what people do with it."""

import re
import shutil
import time
from importlib import resources

import pytest

from maverick_jax.assets.digits import held_out, picture
from maverick_jax.serving.http.pages import FILES
from oracle.scripted_engine import ScriptedEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_it_is_whole(serve):
    """Its parts are there, may fetch nothing from elsewhere, and name nothing that is elsewhere."""
    client = serve("yes")
    for path, name in FILES.items():
        answer = client.get(path)
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.body == resources.files("maverick_jax.serving.http").joinpath("page", name).read_text()
        assert not re.search(r"https?:|//\w", re.sub(r"^\s*//.*|;\s*//.*|\{ //.*", "", answer.body, flags=re.MULTILINE)), name
    with client.send("HEAD", "/") as response:  # with which Claude Code begins
        assert response.status == 200


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; whatever it complains of, or asks of others, is a failure."""
    complaints = []
    context = browser.new_context(viewport={"width": 900, "height": 700})

    def opened(client):
        page, home = context.new_page(), f"http://{client.host}:{client.port}/"

        def complain(message) -> None:
            if message.type in ("error", "warning") and "Failed to load resource" not in message.text:  # a status that is no 200
                complaints.append(message.text)

        def asked(request) -> None:
            if not request.url.startswith((home, "data:")):
                complaints.append(request.url)

        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", asked)
        page.goto(home)
        return page

    yield opened
    context.close()
    assert not complaints


def answer_of(page) -> str:
    return page.locator("article.assistant p").last.inner_text()


def test_a_question_about_two_pictures(mini, open_page, tmp_path):
    """With the mini model: add them, ask, read, change the question, ask again, reload, begin anew."""
    page = open_page(mini)
    files = []
    for number, pixels in enumerate(held_out()[0][:2]):
        files.append(tmp_path / f"{number}.png")
        picture(pixels).save(files[-1])
    page.locator("#settings summary").click()
    page.locator("input[name=temperature]").fill("0")
    page.locator("input[name=max_tokens]").fill("12")
    page.locator("#settings summary").click()
    page.locator("#files").set_input_files(files)
    page.locator("#pictures img").nth(1).wait_for()
    page.locator("#text").fill("What is the sum?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Again").wait_for()
    first = answer_of(page)
    assert re.fullmatch(r"\d \+ \d = \d+\.", first)
    assert page.locator("article.user img").count() == 2
    assert "first token after" in page.locator("article.assistant footer").inner_text()
    assert page.title() == page.locator("h1").inner_text() == "mini"
    page.get_by_role("button", name="Again").click()
    page.get_by_role("button", name="Again").wait_for()
    assert answer_of(page) == first
    page.reload()
    assert answer_of(page) == first
    assert page.locator("article.user img").count() == 2
    page.locator("#text").press("ArrowUp")  # in an empty field: the last question, to be changed
    assert page.locator("#text").input_value() == "What is the sum?"
    assert page.locator("#pictures img").count() == 2
    page.locator("#text").fill("Which digit is left?")
    page.locator("#send").click()
    page.get_by_role("button", name="Again").wait_for()
    assert answer_of(page).startswith("The left digit is")
    page.locator("#new").click()
    assert page.locator("article").count() == 0


def test_an_answer_is_stopped(serve, open_page):
    """It comes as it is said; Escape ends it, here and in the engine, and what came stays."""
    engine = ScriptedEngine(lambda prompt: "word " * 10_000, pause=0.01)
    page = open_page(serve(engine))
    page.locator("#text").fill("Tell me.")
    page.keyboard.press("Enter")
    page.locator("article.assistant p").wait_for()
    lengths = [len(answer_of(page))]
    while len(lengths) < 4:
        time.sleep(0.3)
        lengths.append(len(answer_of(page)))
    assert lengths == sorted(set(lengths))
    assert "tokens/s" in page.locator("article.assistant footer").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Again").wait_for()
    assert "stopped" in page.locator("article.assistant footer").inner_text()
    assert answer_of(page).startswith("word word")
    end = time.monotonic() + 20
    while engine.running:
        assert time.monotonic() < end


def test_pictures_are_dropped_and_pasted(serve, open_page):
    """And removed; what is no picture is not taken."""
    page = open_page(serve("yes"))
    for kind, where in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([kind, where]) => {
                const held = new DataTransfer();
                held.items.add(new File(["x"], "a.png", { type: "image/png" }));
                held.items.add(new File(["x"], "a.txt", { type: "text/plain" }));
                const event = new Event(kind, { bubbles: true, cancelable: true });
                Object.defineProperty(event, where, { value: held });
                document.body.dispatchEvent(event);
            }""",
            [kind, where],
        )
    page.locator("#pictures img").nth(1).wait_for()
    assert page.locator("#pictures img").count() == 2
    page.get_by_role("button", name="Remove").first.click()
    assert page.locator("#pictures img").count() == 1


def test_by_keyboard_alone_and_what_is_wrong(serve, open_page, monkeypatch):
    """Tab reaches everything; a missing key is said, and one that is given is sent; html stays text; light and dark."""
    from maverick_jax.serving.http.keys import VARIABLE, Keys

    monkeypatch.setenv(VARIABLE, "secret")
    page = open_page(serve("<b>bold</b> ```py\nx = 1\n```", keys=Keys()))
    page.get_by_text("asks for an API key").wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "key":
            break
    page.keyboard.type("secret")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Again").wait_for()
    assert page.locator("article.assistant p").first.inner_text().strip() == "<b>bold</b>"
    assert page.locator("article.assistant pre").inner_text().strip() == "x = 1"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.locator("input[name=temperature]").fill("-1")
    page.get_by_role("button", name="Again").click()
    page.locator("article .error").wait_for()
    assert "temperature is -1" in page.locator("article .error").inner_text()
