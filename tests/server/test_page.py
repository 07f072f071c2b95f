"""The page at / and its chat, used in a real Chromium."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from browser import FRAMES, Browser
from fleet_server import KEY, FleetServer
from server_process import ServerProcess
from tiny_models import save_tool_model

FILES = Path(__file__).parents[2] / "src/octavo/server/page/files"
HTML = {"Accept": "text/html"}
ANSWER = """<think>Is <b>this</b> safe?</think>
# Of <script>alert(1)</script>

<img src=x onerror="alert(2)"> [click](javascript:alert(3)) [also](java\tscript:alert(4)) <a href="data:x">x</a>
**bold** and `code` and [a page](https://example.org/a_b?c=d&e) and ![image](https://example.org/i.png)

1. one
   - two
2. three

| a | b |
| - | -: |
| 1 | <i>2</i> |

```html"><script>alert(5)</script>
<script>alert(6)</script>
```
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with keys, whose model always gives ANSWER."""
    model = save_tool_model(tmp_path_factory.mktemp("hostile"), ANSWER)
    flags = ("--api-key", "sk-right", "--admin-key", KEY, "--reasoning-parser", "qwen3")
    with ServerProcess(model, *flags) as server:
        yield server


def ask(browser: Browser, text: str, seconds: float = 20) -> None:
    """Send a message, and wait for the end of the answer."""
    before = len(browser.all(".facts"))
    browser.one(".composer textarea").send_keys(text, Keys.ENTER)
    browser.until(lambda: len(browser.all(".facts")) == before + 1 and not browser.all(".stop"), "an answer", seconds)


def set_up(browser: Browser, **settings: str) -> None:
    """Fill in settings of the conversation."""
    browser.one("button.quiet").click()
    for name, value in settings.items():
        browser.one(f".settings [name={name}], .settings #{name}").send_keys(value)
    browser.one("button.quiet").click()


# Files


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_scripts_are_valid() -> None:
    for file in FILES.glob("*.js"):
        check = ["node", "--input-type=module", "--check"]
        done = subprocess.run(check, input=file.read_text(), capture_output=True, text=True)
        assert done.returncode == 0, (file.name, done.stderr)


def test_no_text_is_parsed_as_html() -> None:
    for file in FILES.glob("*.js"):
        text = file.read_text()
        assert not [bad for bad in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(") if bad in text], file.name
    assert "http://" not in (FILES / "index.html").read_text() and "https://" not in (FILES / "index.html").read_text()


def test_files_are_cached_compressed_and_guarded(fleet: FleetServer) -> None:
    page = fleet.http.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    for file in FILES.iterdir():
        reply = fleet.http.get(f"/page/{file.name}")
        assert reply.content == file.read_bytes() and reply.headers["content-encoding"] == "gzip"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "trusted-types" in policy
        plain = fleet.http.get(f"/page/{file.name}", headers={"Accept-Encoding": "identity"})
        assert plain.content == reply.content and "content-encoding" not in plain.headers
        etag = reply.headers["etag"]
        assert plain.headers["etag"] == etag
        same = fleet.http.get(f"/page/{file.name}", headers={"If-None-Match": etag})
        assert (same.status_code, same.content) == (304, b"")
    for name in ("nothing.js", "../routes.py", "%2e%2e/routes.py", "..%2froutes.py"):
        assert fleet.http.get(f"/page/{name}").status_code == 404
    assert fleet.http.get("/").text == "Octavo is running"  # to Ollama's clients


def test_a_server_without_the_page(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama, "--no-page", "--api-key", "sk-right", "--admin-key", KEY) as server:
        admin, client = ({"Authorization": f"Bearer {key}"} for key in (KEY, "sk-right"))
        assert httpx.get(f"{server.url}/", headers=HTML).status_code == 401
        assert httpx.get(f"{server.url}/", headers=HTML | client).text == "Octavo is running"
        assert httpx.get(f"{server.url}/page/main.js", headers=client).status_code == 404
        assert httpx.get(f"{server.url}/stats/live", headers=admin).status_code == 404


def test_the_first_paint_is_small(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    browser.one(".composer textarea")
    browser.one("option, select.model")
    sizes = browser.run(
        "const files = [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".filter((each) => !each.name.includes('/v1/'));"
        "return [files.length, files.reduce((sum, each) => sum + each.decodedBodySize, 0),"
        " files.reduce((sum, each) => sum + each.encodedBodySize, 0)]"
    )
    files, decoded, encoded = sizes
    print(f"{files} files, {decoded} bytes, {encoded} compressed")
    assert files > 10 and decoded < 100_000 and encoded < 40_000


# Chat


def test_chat(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    browser.until(
        lambda: browser.texts("select.model option") == ["tiny", "later", "nick → tiny", "both (split)"], "models"
    )
    set_up(browser, system="Be brief.", max_tokens="12", temperature="0.5", seed="7")
    ask(browser, "Hello there")
    [first] = browser.texts(".message.assistant .markdown")
    assert first and "12 tokens" in browser.one(".facts").text
    assert browser.texts("#conversations .open") == ["Hello there"]

    browser.button("Retry").click()  # the same seed: the same answer
    browser.until(lambda: browser.all(".stop") or browser.texts(".facts"))
    browser.until(
        lambda: browser.texts(".message.assistant .markdown") == [first] and not browser.all(".stop"), "a retry"
    )

    browser.run("document.querySelector('.message.user [aria-label=Edit]').click()")
    edit = browser.one(".edit textarea")
    assert edit.get_attribute("value") == "Hello there"
    edit.send_keys(" again", Keys.ENTER)
    browser.until(
        lambda: browser.texts(".message.user .text") == ["Hello there again"] and browser.all(".facts"), "an edit"
    )
    assert browser.texts(".message.assistant .markdown") != [first]
    ask(browser, "A second question")
    assert len(browser.all(".message")) == 4

    browser.driver.refresh()  # it was kept in the browser
    browser.until(lambda: browser.texts("#conversations .open") == ["Hello there again"], "the list")
    browser.one("#conversations .open").click()
    assert len(browser.all(".message")) == 4
    browser.button("Rename").click()
    browser.one("dialog input").clear()
    browser.one("dialog input").send_keys("A title", Keys.ENTER)
    browser.until(lambda: browser.texts("#conversations .open") == ["A title"], "a new title")
    browser.press("k", held=Keys.CONTROL)
    browser.press("nothing like it")
    browser.until(lambda: browser.texts("#conversations .none") == ["Nothing found"], "a search")
    browser.press(Keys.ESCAPE)
    browser.one("#conversations .open")
    browser.button("Export").click()
    browser.button("Delete").click()
    browser.one("dialog .danger").click()
    browser.until(lambda: browser.texts("#conversations .none") == ["No conversations yet"], "the end")
    assert browser.run("const d = await indexedDB.databases(); return d.length") == 1


def long_answer(fleet: FleetServer, text: str, most: int) -> str:
    """A seed with which the model's answer to `text` has `most` tokens."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": most}
    for seed in range(100):
        reply = fleet.http.post("/v1/chat/completions", json=body | {"seed": seed}).json()
        if reply["choices"][0]["finish_reason"] == "length":
            return str(seed)
    raise AssertionError("all answers are short")


@contextlib.contextmanager
def suspended(fleet: FleetServer) -> Iterator[None]:
    """Suspend the engines, so that no answer is complete before the end of the `with` block."""
    pids = fleet.engine_pids()
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_stop(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    set_up(browser, max_tokens="400", seed=long_answer(fleet, "Go on", 400))
    browser.one(".composer textarea").send_keys("Go on", Keys.ENTER)
    browser.until(lambda: any(browser.texts(".message.assistant .markdown")), "the first words")
    with suspended(fleet):
        browser.press(Keys.ESCAPE)
        browser.until(lambda: not browser.all(".stop"), "an end")
    assert "stopped" in browser.one(".facts").text
    ask(browser, "And now?")


@pytest.mark.parametrize("action", ["Edit", "Retry"])
def test_the_answer_after_one_that_was_cut_off_can_be_stopped(
    browser: Browser, fleet: FleetServer, action: str
) -> None:
    browser.open(fleet.url)
    set_up(browser, max_tokens="8")
    ask(browser, "Go on")
    with suspended(fleet):
        browser.one(".composer textarea").send_keys("And then?", Keys.ENTER)
        browser.until(lambda: browser.all(".message.growing") and browser.all(".stop"), "an answer")
        browser.run(f"document.querySelector('[aria-label={action}]').click()")
        if action == "Edit":
            browser.one(".edit textarea").send_keys(" please", Keys.ENTER)
        browser.until(lambda: len(browser.all(".message")) == 2, "an answer in its place")
        assert browser.all(".stop")
        browser.press(Keys.ESCAPE)
        browser.until(lambda: "stopped" in "".join(browser.texts(".facts")), "its end")


CLICK = """
const text = document.createTreeWalker(document.querySelector(".assistant .markdown"), NodeFilter.SHOW_TEXT).nextNode();
const range = document.createRange();
range.setStart(text, 0);
range.setEnd(text, 1);
const { x, y } = range.getBoundingClientRect();
const click = new MouseEvent("click", { bubbles: true, clientX: x + 2, clientY: y + 5 });
document.elementFromPoint(x + 2, y + 5).dispatchEvent(click);
"""
READ = """
const answer = document.querySelector(".assistant");
const inside = [...answer.querySelectorAll(".markdown *")];
return {
  text: answer.querySelector(":scope > .markdown").textContent,
  tags: inside.map((each) => each.localName),
  links: [...answer.querySelectorAll("a")].map((each) => [each.getAttribute("href"), each.rel, each.target]),
  reasoning: answer.querySelector(".reasoning").open,
  thought: answer.querySelector(".reasoning .markdown").textContent,
  attributes: inside.flatMap((each) => [...each.attributes].map(({ name }) => name)),
};
"""


def test_alternatives_of_a_word(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    set_up(browser, max_tokens="8", temperature="0")
    ask(browser, "Once upon")
    text = browser.texts(".message.assistant .markdown")[0]
    # Click the first character of the answer: the likeliest token there, as the temperature is 0.
    browser.run(CLICK)
    rows = browser.until(lambda: browser.texts(".alternatives li"), "alternatives")
    body = {"messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 8, "temperature": 0}
    reply = fleet.http.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 6}).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert (
        len(rows) == 7
        and rows[-1].startswith("others")
        and reply["choices"][0]["message"]["content"].strip()[:1] in text
    )
    assert len(browser.all(".alternatives .chosen")) == 1
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all(".alternatives"), "their end")

    browser.button("Probabilities of the tokens").click()
    assert len(browser.all(".token")) == len(content)
    browser.all(".token")[0].click()
    browser.one(".alternatives")
    browser.press(Keys.ESCAPE, Keys.ARROW_RIGHT, Keys.ENTER)
    browser.one(".alternatives")
    assert browser.run("return document.querySelectorAll('.token')[1].tabIndex") == 0
    browser.press(Keys.ESCAPE)


def test_what_a_model_writes_is_text(browser: Browser, guarded: ServerProcess) -> None:
    browser.allowed = ("401",)
    browser.open(guarded.url)
    browser.one("dialog input[type=password]").send_keys("sk-right", Keys.ENTER)
    browser.until(lambda: browser.texts("select.model option"), "models")
    ask(browser, "Say it")
    page = browser.run(READ)
    assert page["reasoning"] is False and page["thought"] == "Is <b>this</b> safe?"
    assert not {"script", "img", "i", "b", "iframe"} & set(page["tags"])
    assert {"h2", "strong", "code", "ol", "ul", "table", "pre"} <= set(page["tags"])
    rel = "noopener noreferrer nofollow"
    assert page["links"] == [
        ["https://example.org/a_b?c=d&e", rel, "_blank"],
        ["https://example.org/i.png", rel, "_blank"],
    ]
    assert not [name for name in page["attributes"] if name.startswith("on") or name in ("src", "style", "srcdoc")]
    for part in (
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(2)">',
        "<script>alert(6)</script>",
        "<i>2</i>",
    ):
        assert part in page["text"]
    browser.driver.refresh()
    browser.one("#conversations .open").click()  # what was kept is text, too
    assert not browser.all(".assistant script, .assistant img")


NEW_TAB = 'target="_blank" rel="noopener noreferrer nofollow"'
BOX = '<input type="checkbox" disabled=""'
MARKDOWN = {
    "a *b* **c** ~~e~~ `f`": "<p>a <em>b</em> <strong>c</strong> <del>e</del> <code>f</code></p>",
    "***d***": "<p><em><strong>d</strong></em></p>",
    "snake_case_name and 2*3*4 * 5": "<p>snake_case_name and 2<em>3</em>4 * 5</p>",
    "# A #\n## B": "<h2>A</h2><h3>B</h3>",
    "- a\n- b\n  1. c\n  2. d\n\ne": "<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol></li></ul><p>e</p>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> - b\n\n---": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><hr>",
    "- [x] a\n- [ ] b": f'<ul><li>{BOX} checked=""> a</li><li>{BOX}> b</li></ul>',
    r"\*a\* \[b](c)": "<p>*a* [b](c)</p>",
    "a  \nb": "<p>a  <br>b</p>",
    "**unclosed and *also": "<p>**unclosed and *also</p>",
    "https://a.org/a.": f'<p><a href="https://a.org/a" {NEW_TAB} title="https://a.org/a">https://a.org/a</a>.</p>',
    "[x](ftp://a)": '<p><span title="This link is not followed: ftp://a">x</span></p>',
    "[y](vbscript:z)": '<p><span title="This link is not followed: vbscript:z">y</span></p>',
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}
RENDER = """
const { render, GrowingMarkdown } = await import("/page/markdown.js");
const box = () => document.createElement("div");
return args[0].map((text) => {
  const [whole, grown] = [box(), box()];
  whole.append(render(text));
  const growing = new GrowingMarkdown(grown);
  for (let end = 1; end <= text.length; end++) growing.update(text.slice(0, end));
  return [whole.innerHTML, grown.innerHTML];
});
"""
SLOW = """
const { render } = await import("/page/markdown.js");
return args[0].map(([part, times]) => {
  const began = performance.now();
  render(part.repeat(times));
  return performance.now() - began;
});
"""


def test_markdown(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    rendered = browser.run(RENDER, list(MARKDOWN))
    for (text, expected), (whole, grown) in zip(MARKDOWN.items(), rendered, strict=True):
        assert whole == expected, text
        assert grown == expected, f"{text} as it grows"
    hostile = [
        "*",
        "_a ",
        "`",
        "[",
        "![",
        "[a](",
        "> ",
        "- ",
        "# ",
        "|-",
        "~~",
        "<",
        "\\",
        "a|b\n",
        "**a* ",
        "1. ",
        " " * 40,
        "https://",
    ]
    times = browser.run(SLOW, [[part, 20_000] for part in hostile] + [["|" + " " * 99_999 + "x\n", 2]])
    assert max(times) < 2000, sorted(zip(times, [*hostile, "table"], strict=True))[-3:]


def test_theme_and_help(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    browser.one(".composer textarea")
    browser.prefer("light")
    light = browser.run(background)
    browser.prefer("dark")
    dark = browser.run(background)
    assert light != dark
    browser.button("Switch between light and dark").click()
    browser.driver.refresh()
    browser.one(".composer textarea")
    assert browser.run(background) == light  # the choice is kept
    browser.prefer("light")
    browser.run("document.activeElement.blur()")
    browser.press("?")
    assert browser.one("dialog h2").text == "Keyboard"
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all("dialog"), "the end of the dialog")
    browser.press("/")
    assert browser.run("return document.activeElement.ariaLabel") == "Message"


# Keys


def test_keys(browser: Browser, guarded: ServerProcess) -> None:
    assert httpx.get(f"{guarded.url}/", headers=HTML).status_code == 200  # the page itself needs none
    assert httpx.get(f"{guarded.url}/stats/live").status_code == 401
    browser.allowed = ("401",)
    browser.open(guarded.url)
    browser.one("dialog input[type=password]").send_keys("sk-wrong", Keys.ENTER)
    browser.until(lambda: any("is not valid" in text for text in browser.texts("dialog p")), "a refusal")
    browser.one("dialog input[type=password]").send_keys("sk-right")
    browser.one("dialog form .primary").click()
    browser.until(lambda: browser.texts("select.model option"), "models")
    kept = "return [sessionStorage.getItem('octavo-key-client'), localStorage.getItem('octavo-key-client')]"
    assert browser.run(kept) == ["sk-right", None]
    browser.driver.refresh()
    browser.until(lambda: browser.texts("select.model option"), "models")
    assert not browser.all("dialog")

    browser.driver.get(f"{guarded.url}#models")
    browser.one("dialog input[type=password]").send_keys(KEY)
    browser.one("dialog [type=checkbox]").click()
    browser.one("dialog form .primary").click()
    browser.one("[data-model]")
    assert browser.run("return localStorage.getItem('octavo-key-admin')") == KEY
    browser.driver.get(f"{guarded.url}#live")
    browser.until(lambda: browser.texts(".state") == ["live"], "the live view")
    browser.button("API keys").click()
    browser.all("dialog .row button")[3].click()
    assert browser.run("return localStorage.getItem('octavo-key-admin')") is None


# Speed. The bounds are loose, as other tests may run at the same time.

WATCH = (
    FRAMES
    + """
const began = performance.now();
window.measured = () => {
  going = false;
  return { frames: 1000 * times.length / (performance.now() - began), long: Math.max(0, ...long) };
};
"""
)


def test_a_fast_stream_drops_no_frames(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    set_up(browser, max_tokens="450", seed=long_answer(fleet, "Go on", 450))
    browser.run(WATCH)
    ask(browser, "Go on")
    measured = browser.run("return window.measured()")
    match = re.search(r"450 tokens .* (\d+) tokens/s", browser.one(".facts").text)
    assert match
    print(match[0], measured)
    assert int(match[1]) > 100 and measured["frames"] > 20
