"""The page: its Markdown in node, and all of it in a real browser."""

import base64
import contextlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from dsjax.checkpoint import load
from dsjax.infer.looking import look_by, open_format
from dsjax.infer.pictured import PICTURES
from dsjax.text.chat import Message
from tests.serve.scripted import make_service, make_site, running
from tests.serve.test_chat import STOP, spell
from tests.serve.test_picture_parts import png
from tests.vision import toy

PAGE = Path(__file__).parents[2] / "dsjax/serve/page"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = (
    '<img src=x onerror="window.hurt=1"> <script>window.hurt=2</script>\n\n'
    "[click](javascript:window.hurt=3) [data](data:text/html,x)\n\n"
    "<svg/onload=window.hurt=4>\n\n`<b>` **<i>bold</i>** \\(<u>\\)\n\n"
    "```<b onclick=x>\n</code><script>window.hurt=5</script>\n```\n\n"
    "| <b>a</b> | b |\n|---|---|\n| <hr> | 2 |\n"
)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_markdown_is_a_tree_of_texts():
    text = (
        "# One *two*\n\nSome `a*b*` **bold** \\*not\\* [x](https://a.b/c) and\nmore.\n\n"
        "- a\n  - b\n- c\n\n3. x\n4. y\n\n```python\nprint('*')\n```\n\n> quoted\n\n"
        "$$\na_1 * b_2 * c\n$$\n\n\\(a_1 * b_2 * c_3\\)\n\n| a | b |\n|---|:-:|\n| 1 | 2 |\n\n---\n"
        "```\nopen"
    )
    tree = parse(text)
    kinds = [block["kind"] for block in tree]
    assert kinds == ["h", "p", "list", "list", "code", "quote", "math", "p", "table", "hr", "code"]
    assert [part["kind"] for part in tree[0]["inline"]] == ["text", "em"]
    assert [p["kind"] for p in tree[1]["inline"] if p["kind"] != "text"] == [
        "code",
        "strong",
        "link",
    ]
    assert "*not*" in "".join(part.get("text", "") for part in tree[1]["inline"])
    assert tree[2]["items"][0][1]["kind"] == "list" and len(tree[2]["items"]) == 2
    assert tree[3]["ordered"] and tree[3]["start"] == 3
    assert (tree[4]["language"], tree[4]["text"]) == ("python", "print('*')")
    assert tree[6]["text"] == "a_1 * b_2 * c"
    assert tree[7]["inline"] == [{"kind": "math", "text": "a_1 * b_2 * c_3"}]
    assert len(tree[8]["rows"]) == 1 and tree[10]["text"] == "open"


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize(
    "text", ["*" * 20_000, "`" * 20_000, "[" * 20_000, "> " * 5_000, "- " * 5_000, "|-" * 9_000,
             "\\(" * 9_000, "**a " * 5_000, "a\n" * 9_000]
)  # fmt: skip
def test_markdown_of_any_text_is_quick(text):
    start = time.monotonic()
    parse(text)
    assert time.monotonic() - start < 10


def parse(text):
    code = (
        f"import {{parse}} from {json.dumps(str(PAGE / 'markdown.js'))};"
        "let text = ''; for await (const part of process.stdin) text += part;"
        "console.log(JSON.stringify(parse(text)));"
    )
    return json.loads(node(code, text))


def node(code, text=""):
    """Runs a module, which reads `text`; returns what it prints."""
    command = ["node", "--input-type=module", "-e", code]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_pictures_of_a_turn_go_before_its_text():
    turns = [
        {"role": "user", "content": "What?", "pictures": [{"id": "a", "name": "a.png"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "", "pictures": [{"id": "b"}, {"id": "a"}]},
        {"role": "user", "content": "Plain"},
    ]
    code = (
        f"import * as store from {json.dumps(str(PAGE / 'conversations.js'))};"
        f"const turns = {json.dumps(turns)};"
        "const urls = new Map([['a', 'data:A'], ['b', 'data:B']]);"
        "const asked = store.body(turns, store.DEFAULTS, 'm', true, urls);"
        "const title = [store.title(turns), store.title(turns.slice(2, 3))];"
        "console.log(JSON.stringify([asked.messages, store.pictureIds(turns), title]));"
    )
    messages, ids, titles = json.loads(node(code))

    def shown(letter):
        return {"type": "image_url", "image_url": {"url": f"data:{letter}"}}

    assert [each["content"] for each in messages] == [
        [shown("A"), {"type": "text", "text": "What?"}],
        "A cat.",
        [shown("B"), shown("A")],
        "Plain",
    ]
    assert ids == ["a", "b", "a"] and titles == ["What?", "Picture"]


def reply(request, coder):
    """What the model says depends on what it is asked."""
    asked = coder.decode(request.prompt)
    if "hostile" in asked:
        return [HOSTILE, "</think>", HOSTILE, STOP]
    if "long" in asked:
        return ["word " * 60, STOP]
    answer = "\n\nAn *answer*:\n\n```python\nprint(1)\n```\n\n\\(x_1\\)"
    return ["\nSome thought", "</think>", answer, STOP]


@contextlib.contextmanager
def served(service):
    """Context of a scripted server at a port of its own; yields its address and engine."""
    coder = service.vocabulary.coder
    with running(service, lambda request: spell(coder, reply(request, coder))) as engine:
        site = make_site(service)
        config = uvicorn.Config(site, port=0, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}", engine
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "install Chromium, and the package playwright"
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, folders):
    with page_of(browser, make_service(folders["R1"], context=4000)) as found:
        yield found


@contextlib.contextmanager
def page_of(browser, service):
    """Context of the page, whose complaints are gathered, and the engine behind it."""
    with served(service) as (url, engine):
        context = browser.new_context(viewport={"width": 1100, "height": 800})
        page = context.new_page()
        page.set_default_timeout(20_000)
        complaints = []
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        until(lambda: page.inner_text("#model") == "tiny")
        yield page, engine
        assert complaints == []
        context.close()


def say(page, text):
    page.fill("#ask", text)
    page.press("#ask", "Enter")


def until(holds):
    """Waits; the page's policy lets no test evaluate a condition in it again and again."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def finished(page, count):
    until(lambda: page.locator(".assistant .actions").count() == count)
    page.wait_for_selector("#stop", state="hidden")


@pytest.mark.slow
def test_conversation_in_a_browser(opened, tmp_path):
    page, engine = opened
    say(page, "Hello")
    finished(page, 1)
    summary = page.locator("details.thought summary")
    assert summary.inner_text().startswith("Thought for ")
    assert page.locator("details.thought").get_attribute("open") is None
    assert page.locator(".assistant em").inner_text() == "answer"
    assert page.locator("pre code").inner_text() == "print(1)"
    assert page.locator(".math").inner_text() == "x_1"
    assert "tokens" in page.inner_text("#status")
    page.get_by_role("button", name="Regenerate").click()
    finished(page, 1)
    assert len(engine.requests) == 2 and engine.requests[0].prompt == engine.requests[1].prompt
    page.click("#adjust")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    page.fill("#seed", "7")
    page.press("#seed", "Tab")
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Message").first.fill("Changed")
    page.locator(".edit + .actions button").first.click()
    finished(page, 1)
    assert page.locator(".user .body").inner_text() == "Changed"
    assert (engine.requests[2].sampling.temperature, engine.requests[2].sampling.seed) == (0.3, 7)
    page.click("#new")
    say(page, "Second one")
    finished(page, 1)
    page.reload()
    assert page.locator("#list li").count() == 3  # and the one that is new
    page.get_by_role("button", name="Changed", exact=True).click()
    assert page.locator(".assistant pre").count() == 1
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        page.screenshot(path=tmp_path / f"{theme}.png")
    page.set_viewport_size({"width": 380, "height": 700})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 380
    page.click("#menu")
    assert page.locator("#side").is_visible()
    page.screenshot(path=tmp_path / "phone.png")
    page.get_by_role("button", name="Delete Changed").click()
    assert page.locator("#list li").count() == 2


@pytest.mark.slow
def test_hostile_reply_is_text(opened):
    page, _ = opened
    say(page, "hostile")
    finished(page, 1)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hurt") is None
    body = page.locator(".assistant .body")
    assert body.locator("img, script, svg, b, i, u, hr").count() == 0
    assert body.locator("a").count() == 0
    assert "<script>window.hurt=2</script>" in body.inner_text()
    assert "<script>window.hurt=2</script>" in page.locator(".thought div").text_content()
    assert page.locator(".thought div *").count() == 0
    assert page.locator("#list .open").first.inner_text() == "hostile"
    say(page, "<img src=x onerror='window.hurt=9'> hostile")
    finished(page, 2)
    assert page.evaluate("window.hurt") is None and page.locator("#list img").count() == 0


@pytest.mark.slow
def test_reply_is_stopped_by_the_reader(opened):
    page, engine = opened
    engine.gate.clear()
    say(page, "long")
    page.wait_for_selector("#stop:not([hidden])")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    until(lambda: engine.cancelled == [1])


@pytest.mark.slow
def test_base_model_continues_what_is_written(browser, folders):
    with page_of(browser, make_service(folders["base"], context=4000)) as (page, engine):
        until(lambda: "base model" in page.inner_text("#status"))
        say(page, "long <b>")
        finished(page, 1)
        assert page.locator(".assistant pre").inner_text().startswith("word word")
        (request,) = engine.requests
        assert request.max_new_tokens == 256


@pytest.fixture
def sighted(browser, tmp_path):
    """The page of a model that sees, the engine behind it, and its format."""
    checkpoint = load.open_checkpoint(toy.write(tmp_path / "janus"))
    form = open_format(checkpoint)
    service = make_service(checkpoint.path, form=form, context=512)
    service.looking = look_by(form, checkpoint, None, "float32")
    with page_of(browser, service) as (page, engine):
        until(lambda: page.locator("#attach").is_visible())
        yield page, engine, form


def give(page, event, selector, name, data):
    """Pastes or drops a file, as a browser does it."""
    code = (
        "([event, selector, name, data]) => {"
        "  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));"
        "  const files = new DataTransfer();"
        "  files.items.add(new File([bytes], name, { type: 'image/png' }));"
        "  const Kind = event === 'paste' ? ClipboardEvent : DragEvent;"
        "  const held = event === 'paste' ? 'clipboardData' : 'dataTransfer';"
        "  const given = { [held]: files, bubbles: true, cancelable: true };"
        "  document.querySelector(selector).dispatchEvent(new Kind(event, given));"
        "}"
    )
    page.evaluate(code, [event, selector, name, base64.b64encode(data).decode()])


@pytest.mark.slow
def test_pictures_in_a_browser(sighted, tmp_path):
    """By the button, pasted and dropped; shown, sent, kept, edited and removed."""
    page, engine, form = sighted
    seeds = {name: png(seed) for seed, name in enumerate(("one.png", "two.png", "three.png"))}
    (tmp_path / "one.png").write_bytes(seeds["one.png"])
    page.set_input_files("#files", tmp_path / "one.png")
    until(lambda: page.locator("#attached img").count() == 1)
    give(page, "paste", "#ask", "two.png", seeds["two.png"])
    until(lambda: page.locator("#attached img").count() == 2)
    give(page, "drop", "main", "three.png", seeds["three.png"])
    until(lambda: page.locator("#attached img").count() == 3)
    assert page.inner_text("#status") == "3 pictures are attached."
    page.get_by_role("button", name="Remove two.png").click()
    assert page.inner_text("#status") == "2 pictures are attached."
    page.screenshot(path=tmp_path / "attached.png")
    say(page, "What is this?")
    finished(page, 1)
    assert page.locator("#attached li").count() == 0

    def asked(text):
        shown = [form.decode(seeds[name], "") for name in ("one.png", "three.png")]
        return tuple(form.encode([Message("user", text, {PICTURES: shown})]))

    assert tuple(engine.requests[0].prompt) == asked("What is this?")
    assert len(engine.requests[0].given.values) == 2 * form.vision.tower.n_tokens
    names = [each.get_attribute("alt") for each in page.locator(".user img").all()]
    assert names == ["one.png", "three.png"]
    page.reload()
    page.get_by_role("button", name="What is this?", exact=True).click()
    until(lambda: page.locator(".user img").count() == 2)
    until(lambda: page.locator("#attach").is_visible())
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Message").first.fill("And now?")
    page.locator(".edit + .actions button").first.click()
    finished(page, 1)
    assert tuple(engine.requests[1].prompt) == asked("And now?")
    assert page.locator(".user img").count() == 2
    page.set_viewport_size({"width": 380, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.screenshot(path=tmp_path / "phone.png")


@pytest.mark.slow
def test_pictures_that_cannot_be_sent_are_named(sighted, tmp_path):
    page, engine, _ = sighted
    for name, data in (("a.txt", b"text"), ("broken.png", b"no picture"), ("good.png", png(1))):
        (tmp_path / name).write_bytes(data)
    page.set_input_files(
        "#files", [tmp_path / name for name in ("a.txt", "broken.png", "good.png")]
    )
    until(lambda: page.locator("#attached img").count() == 1)
    said = page.inner_text("#status")
    assert "a.txt is no PNG, JPEG, WebP, GIF or BMP picture." in said
    assert "broken.png is damaged, or no picture." in said and "1 picture is attached." in said
    (tmp_path / "large.png").write_bytes(png(2, (1500, 1500)))
    page.set_input_files("#files", tmp_path / "large.png")
    until(lambda: "With large.png the request has" in page.inner_text("#status"))
    assert "and the server takes 8.4; make the picture smaller." in page.inner_text("#status")
    page.set_input_files("#files", [tmp_path / "good.png"] * 64)
    until(lambda: "at most 64 pictures" in page.inner_text("#status"))
    assert page.locator("#attached img").count() == 64 and not engine.requests


@pytest.mark.slow
def test_a_model_that_does_not_see_is_offered_no_pictures(opened):
    page, _ = opened
    assert not page.locator("#attach").is_visible()
    give(page, "paste", "#ask", "one.png", png(0))
    give(page, "drop", "main", "one.png", png(0))
    page.wait_for_timeout(200)
    assert page.locator("#attached li").count() == 0
    assert "picture" not in page.inner_text("#status")
