"""The page's live view and models, used in a real Chromium."""

import json
import threading
import zlib
from pathlib import Path
from typing import Any

from selenium.webdriver.common.keys import Keys

from browser import FRAMES, Browser
from fleet_server import KEY, FleetServer

STATES = """
window.states = [];
const note = () => states.push(document.querySelector("#live .state")?.textContent);
new MutationObserver(note).observe(document.body, { subtree: true, childList: true });
"""
COLORS = """
const canvas = document.querySelector(".map canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
return new Set(new Uint32Array(data.buffer)).size;
"""


# The live view


def read_live(server: FleetServer) -> list[dict[str, Any]]:
    text = server.http.get("/stats/live").text
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]


def test_events(fleet: FleetServer) -> None:
    begin, stats, pages = read_live(fleet)
    assert [each["type"] for each in (begin, stats, pages)] == ["begin", "stats", "pages"]
    assert set(begin["bounds"]) == set(stats["models"][0]["latencies"])
    with fleet.http.stream("GET", "/stats/live?follow=true", headers={"Accept-Encoding": "gzip"}) as reply:
        begun = zlib.decompressobj(31).decompress(next(reply.iter_raw()))
    assert begun.startswith(b'data: {"type":"begin"')
    assert fleet.http.get("/stats/live?model=nothing").status_code == 404
    assert fleet.http.head("/stats/live?follow=true").content == b""


def test_live(browser: Browser, fleet: FleetServer) -> None:
    browser.open(f"{fleet.url}#live")
    browser.until(lambda: browser.texts(".state") == ["live"], "events")
    stop = threading.Event()

    def load(tenant: str) -> None:
        while not stop.is_set():
            body = {
                "prompt": "Once upon a time there was a king " * 9,
                "max_tokens": 150,
                "tenant": tenant,
                "ignore_eos": True,
            }
            reply = fleet.http.post("/v1/completions", json=body | {"kv_cache_state": True})
            assert reply.status_code == 200, reply.text

    threads = [threading.Thread(target=load, args=(tenant,)) for tenant in ("acme", "globex") * 3]
    for thread in threads:
        thread.start()
    try:
        counts = "#live .legend .count"  # free, cached, in use, shared, pinned, loading, saving
        seen = set[int]()

        def all_seen() -> bool:
            seen.update(state for state, text in enumerate(browser.texts(counts)) if text != "0")
            return {0, 1, 2, 3, 4} <= seen

        browser.until(all_seen, "pages cached, in use, shared and pinned")
        browser.until(lambda: browser.texts("[aria-label=Output] .value")[0] not in ("–", "0"), "a rate")
        browser.until(lambda: browser.texts("[aria-label='First token'] .value")[0] != "–", "a latency")
        browser.until(lambda: {"acme", "globex"} <= set(browser.texts("[aria-label=Tenants] tbody th")), "tenants")
        assert browser.texts("[aria-label=Engines] tbody tr :first-child") == ["the engine"]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    colors = browser.run(COLORS)
    assert colors >= 4
    browser.all(".legend button")[4].click()
    assert browser.all(".legend button")[4].get_attribute("aria-pressed") == "true"
    browser.run("document.querySelector('.map canvas').focus()")
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.one(".map .tip").text.startswith("Page 1\n")
    browser.size(375, 812, is_phone=True)
    assert browser.run("return document.documentElement.scrollWidth") == 375
    browser.button("Menu").click()
    browser.one("nav a[data-view=chat]").click()
    browser.one(".composer textarea")
    assert browser.run("return document.documentElement.scrollWidth") == 375


def test_the_live_view_begins_with_a_model_that_is_loaded(browser: Browser, fleet: FleetServer) -> None:
    for action, name in (("load", "later"), ("unload", "tiny")):
        assert fleet.change(action, name).status_code == 200
    browser.open(fleet.url)
    browser.one(".composer textarea")
    browser.run(STATES)
    browser.run("location.hash = '#live'")
    browser.until(lambda: browser.texts(".legend .count"), "pages")
    browser.until(lambda: browser.texts(".state") == ["live"], "the live view")
    assert browser.run("return document.querySelector('#live select.model').value") == "later"
    assert "reconnecting" not in browser.run("return window.states")
    for action, name in (("load", "tiny"), ("unload", "later")):
        assert fleet.change(action, name).status_code == 200
    # Nobody has chosen a model, so the view goes on with one that is loaded. A sample may be half a second old.
    browser.until(
        lambda: browser.run("return document.querySelector('#live select.model').value") == "tiny", "the other"
    )


# Models


def test_models(browser: Browser, fleet: FleetServer, tiny_llama: Path) -> None:
    browser.allowed = ("401", "400")
    browser.open(f"{fleet.url}#models")
    browser.one("dialog input[type=password]").send_keys(KEY, Keys.ENTER)
    browser.until(lambda: browser.texts("[data-model] .chip") == ["loaded", "unloaded"], "models")
    assert browser.texts(".split .part") == ["tiny 90 %", "later 10 %"]
    browser.click("[data-model=later] .actions button")  # load
    browser.until(lambda: browser.texts("[data-model] .chip") == ["loaded", "loaded"], "a load")
    before = fleet.engine_pids()
    for model, what in ((str(tiny_llama), "done"), ("/nothing/here", "refused")):
        browser.click("[data-model=later] .actions button:nth-child(3)")
        browser.one("dialog [name=model]").send_keys(model, Keys.ENTER)
        if what == "done":
            browser.until(lambda: "later is swapped" in browser.texts("#toast"), "a swap")
    assert fleet.engine_pids() != before
    assert "/nothing/here" in browser.one("dialog .error").text
    browser.button("Close").click()
    browser.click("[data-model=later] .actions button")
    browser.one("dialog .danger").click()
    browser.until(lambda: browser.texts("[data-model] .chip") == ["loaded", "unloaded"], "the end of a model")


# Speed. The bounds are loose, as other tests may run at the same time.

MAPS = (
    FRAMES
    + """
const { PageMap } = await import("/page/page_map.js");
const map = new PageMap("test");
document.querySelector("#chat .scroller").prepend(map.element);
const pages = new Uint8Array(100_000);
const began = performance.now();
while (performance.now() - began < 1000 * args[0]) {
  const next = pages.slice();
  for (let k = 0; k < 5000; k++) next[Math.random() * next.length | 0] = 1 + Math.random() * 250 | 0;
  pages.set(next);
  map.update(next);
  await new Promise(requestAnimationFrame);
}
going = false;
const span = performance.now() - began;
return { frames: 1000 * times.length / span, long: Math.max(0, ...long), size: [map.canvas.width, map.canvas.height] };
"""
)


def test_a_map_of_100_000_pages(browser: Browser, fleet: FleetServer) -> None:
    browser.open(fleet.url)
    browser.one(".composer textarea")
    measured = browser.run(MAPS, 3)
    print(measured)
    assert measured["frames"] > 10
