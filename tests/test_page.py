"""The page in a real browser: what is dropped is judged, what is dragged is told, what is said is kept."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("nicegui")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from flawmap.judging.calibration import binomial_interval
from flawmap.line.inspector import Inspector
from flawmap.service.database import open_database
from flawmap.service.keys import add_key
from flawmap.service.records import Filter, Records

WIDTHS = {1920: 1080, 1280: 800, 390: 844}
expect.set_options(timeout=15_000)


class Server:
    """The page of a store, in a process that can be ended and started again."""

    def __init__(self, store: Path, models: list[Path], *options: object) -> None:
        self.store, self.models, self.options = store, models, options
        self.process: subprocess.Popen | None = None
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("served_page.py")
        command = [sys.executable, script, str(self.port), self.store, *self.models, *self.options]
        self.process = subprocess.Popen(list(map(str, command)))
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            assert self.process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{self.base}/login", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def records(self) -> Records:
        return Records(open_database(f"sqlite:///{self.store / 'records.db'}"))

    def send(self, path: Path, model: str, name: str | None = None) -> int:
        address = f"{self.base}/page-files/inspections?model={model}&name={urllib.parse.quote(name or path.name)}"
        request = urllib.request.Request(address, path.read_bytes(), {"X-Flawmap": "page"}, method="POST")
        with urllib.request.urlopen(request) as answer:
            return int(re.search(rb"\d+", answer.read()).group())


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if root else [])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(exported, exported_live, drawn, broken_file, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    running = Server(store, [exported, exported_live], "--data", drawn.parent)
    for path in sorted((drawn / "test").glob("*/00[01].png")):
        running.send(path, "screws", f"{path.parent.name}.png")
    running.send(broken_file, "live")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def broken_file(broken_image, tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "broken.png"
    Image.fromarray(broken_image).save(path)
    return path


@pytest.fixture
def page(browser):
    """A page that may ask this host alone, and whose scripts fail nowhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    asked, failed = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    yield opened
    context.close()
    assert failed == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []


def go(page, address: str) -> None:
    """Opens a page, and waits until it listens: what is typed before that is lost."""
    page.goto(address)
    page.wait_for_function("window.did_handshake")


def drop(page, path: Path, name: str) -> None:
    """A file of another window, dropped on the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [content, name],
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": transfer})


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def newest(server):
    return server.records.latest(Filter(), 1)[0]


# Live


def test_a_dropped_image_is_judged_and_shown(server, page, broken_file):
    go(page, server.base)
    name = "<img src=x onerror=alert(1)>.png"
    drop(page, broken_file, name)
    light = page.locator(".light")
    expect(light).to_contain_text("DEFECT")
    expect(light).to_contain_text(name)  # as text
    assert page.locator("img[src=x]").count() == 0
    row = newest(server)
    assert (row.verdict, row.name, row.source, row.model) == ("defect", name, "page", "screws")
    expect(page.locator(".facts")).to_contain_text(f"{row.score:.5g}")
    expect(page.locator(".region")).to_have_count(len(row.regions[:20]))
    for kind in ("picture", "heat", "outlines"):
        drawn = page.locator(f'.world img[src="/page-files/inspections/{row.id}/{kind}"]')
        expect(drawn).to_have_js_property("naturalWidth", row.width)


def test_what_others_send_appears_at_once_and_what_is_no_image_is_refused_in_words(server, page, drawn, tmp_path):
    go(page, server.base)
    expect(page.locator(".shot").first).to_be_visible()
    number = server.send(drawn / "test" / "good" / "002.png", "screws")
    expect(page.locator(".shot").first).to_have_attribute("data-id", str(number))
    expect(page.locator(".light")).to_contain_text("GOOD")
    (tmp_path / "no.png").write_bytes(b"no image")
    drop(page, tmp_path / "no.png", "no.png")
    expect(page.get_by_role("alert").filter(has_text="no.png")).to_be_visible()
    assert newest(server).id == number


def test_a_word_given_by_key_is_kept(server, page):
    go(page, server.base)
    shots = page.locator(".shot")
    expect(shots.first).to_have_attribute("aria-current", "true")
    page.keyboard.press("j")
    expect(shots.nth(1)).to_have_attribute("aria-current", "true")
    page.keyboard.press("ArrowRight")
    expect(shots.nth(2)).to_have_attribute("aria-current", "true")
    page.keyboard.press("k")
    expect(shots.nth(1)).to_have_attribute("aria-current", "true")
    number = int(shots.nth(1).get_attribute("data-id"))
    page.keyboard.press("u")
    expect(page.locator(".word.is-unsure")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("d")
    expect(page.locator(".word.is-defect")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".word.is-unsure")).to_have_attribute("aria-pressed", "false")
    assert [said.word for said in server.records.words(number)] == ["unsure", "defect"]
    assert server.records.get(number).word == "defect"
    page.keyboard.press("k")  # the newest again
    page.reload()
    expect(shots.nth(1)).to_contain_text("word: defect")


def test_the_picture_is_zoomed_and_moved(server, page):
    go(page, server.base)
    world = page.locator(".world")
    expect(world).to_have_attribute("style", re.compile(r"scale\(1\)"))
    page.keyboard.press("+")
    page.keyboard.press("+")
    expect(world).to_have_attribute("style", re.compile(r"translate\(0px, 0px\) scale\(1.5625\)"))
    page.keyboard.press("Shift+ArrowLeft")
    expect(world).to_have_attribute("style", re.compile(r"translate\(80px, 0px\)"))
    page.keyboard.press("0")
    expect(world).to_have_attribute("style", re.compile(r"translate\(0px, 0px\) scale\(1\)"))
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -800)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 + 10)
    page.mouse.up()
    expect(world).to_have_attribute("style", re.compile(r"translate\(40(\.\d+)?px, 10(\.\d+)?px\)"))
    page.get_by_label("Heat", exact=True).uncheck()
    expect(page.locator(".world .heat")).to_be_hidden()


# Threshold


def test_a_dragged_threshold_tells_at_once_what_it_rejects_without_the_server(server, page, exported):
    scores = [float(score) for score in Inspector.load(exported, engine="onnxruntime").judge.calibration.scores]
    rows = [row for row in server.records.latest(Filter(model="screws"), 200) if row.score is not None]
    asked, sent = [], []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    go(page, f"{server.base}/threshold?model=screws")
    handle = page.get_by_role("slider", name="Threshold")
    before = float(handle.get_attribute("aria-valuenow"))
    rejected = page.locator('[data-figure="rejected"] b')
    expect(rejected).to_have_text(str(sum(row.score >= before for row in rows)))
    page.wait_for_timeout(500)
    page.on("request", lambda request: asked.append(request.url))
    sent.clear()
    box = page.locator(".chart svg").bounding_box()
    grip = page.locator(".grip").bounding_box()
    y = grip["y"] + grip["height"] / 2
    page.mouse.move(grip["x"] + grip["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.1, y, steps=10)
    page.mouse.up()
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    value = float(handle.get_attribute("aria-valuenow"))
    assert value < before
    reached = sum(score >= value for score in scores)
    low, high = binomial_interval(reached, len(scores))
    expect(rejected).to_have_text(str(sum(row.score >= value for row in rows)))
    expect(page.locator(".rejected li")).to_have_count(sum(row.score >= value for row in rows[:40]))
    told = page.locator('[data-figure="rate"]')
    expect(told).to_contain_text(f"{reached} of {len(scores)}")
    expect(told).to_contain_text(f"{_percent(low)} to {_percent(high)}")
    assert f"{len(rows)} inspected" in handle.get_attribute("aria-valuetext")
    assert [url for url in asked if "/thumb" not in url] == []  # but for pictures that come into view
    assert [frame for frame in sent if len(frame) > 2] == []

    page.get_by_role("button", name="Save as a new version").click()
    expect(page.get_by_label("Versions").locator("tbody tr")).to_have_count(2)
    (kept,) = server.records.thresholds("screws")
    assert kept.value == pytest.approx(value)


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.1 else 1}f} %"


def test_the_browser_computes_the_interval_that_flawmap_does(server, page):
    go(page, f"{server.base}/threshold?model=screws")
    address = re.search(r'"([^"]*threshold\.js[^"]*)"', page.content()).group(1)
    for events, cases in ((0, 12), (1, 299), (7, 60), (60, 60), (500, 1000)):
        found = page.evaluate(
            "([address, k, n]) => import(address).then((module) => module.binomialInterval(k, n))",
            [address, events, cases],
        )
        assert found == pytest.approx(binomial_interval(events, cases), abs=1e-9)


# Knobs


def test_a_knob_moves_the_heatmap(server, page):
    go(page, f"{server.base}/knobs")
    heat = page.locator(".world .heat")
    expect(heat).to_have_attribute("src", re.compile("^data:image/png"))
    before = heat.get_attribute("src")
    page.locator(".knob [tabindex]").first.focus()
    for _ in range(3):
        page.keyboard.press("PageDown")
    expect(heat).not_to_have_attribute("src", before)
    page.get_by_role("button", name="As trained").click()
    expect(heat).to_have_attribute("src", before)


# Quality


def test_quality_holds_words_against_verdicts(server, page, broken_file):
    number = server.send(broken_file, "live", "=cmd.png")
    row = server.records.get(number)
    server.records.say(number, "good" if row.verdict == "defect" else "defect", "")
    go(page, f"{server.base}/quality?model=live")
    wrong = page.get_by_label("Disagreements")
    expect(wrong).to_contain_text(f"judged {row.verdict}")
    with page.expect_download() as got:
        page.get_by_role("link", name="Download CSV").click()
    lines = Path(got.value.path()).read_text().splitlines()
    assert lines[0].startswith("day,model,escapes,escape_cases,escape_low")
    (live,) = [line.split(",") for line in lines[1:] if ",live," in line]
    low, high = binomial_interval(1, 1)
    side = 6 if row.verdict == "defect" else 2
    assert live[side : side + 4] == ["1", "1", f"{low:.6f}", f"{high:.6f}"]


# How it looks, and to whom


@pytest.mark.parametrize("section", ["/", "/threshold?model=screws", "/knobs", "/quality?model=screws", "/train"])
def test_each_section_fits_and_axe_finds_nothing_serious(server, browser, section, tmp_path):
    for (width, height), scheme in zip(WIDTHS.items(), ("light", "dark", "light"), strict=True):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        go(page, server.base + section)
        expect(page.get_by_role("navigation", name="Sections")).to_be_visible()
        page.wait_for_timeout(400)
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        if width != 1920:  # the widest has the layout of the second
            found = Axe().run(page).response["violations"]
            serious = [one for one in found if one["impact"] in ("serious", "critical")]
            assert serious == [], [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in serious]
        context.close()


def test_the_keyboard_reaches_what_matters(server, page):
    go(page, server.base)
    expect(page.locator(".shot").first).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className.split(' ')[0] || document.activeElement.type"))
    assert {"shot", "stage", "checkbox", "range", "file"} <= reached
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != ""


# Sign in


@pytest.fixture(scope="module")
def locked(exported, drawn, tmp_path_factory):
    store = tmp_path_factory.mktemp("locked")
    keys = {role: add_key(store / "keys", f"the-{role}", role) for role in ("inspect", "operate", "administer")}
    running = Server(store / "records", [exported], "--keys", store / "keys", "--data", drawn.parent)
    yield running, keys
    running.stop()


def sign_in(page, server, key: str) -> None:
    go(page, server.base)
    expect(page).to_have_url(f"{server.base}/login")
    page.get_by_label("Key").fill(key)
    page.keyboard.press("Enter")


def test_keys_are_asked_for_and_roles_are_kept(locked, browser, drawn):
    server, keys = locked
    image = drawn / "test" / "good" / "000.png"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.send(image, "screws")
    for role in ("operate", "inspect"):
        context = browser.new_context()
        page = context.new_page()
        sign_in(page, server, keys[role])
        expect(page.locator(".who")).to_contain_text(f"the-{role} ({role})")
        expect(page.get_by_role("link", name="Train")).to_have_count(0)
        if role == "operate":
            drop(page, image, "one.png")
            expect(page.locator(".light")).to_contain_text("one.png")
            page.keyboard.press("g")
            expect(page.locator(".word.is-good")).to_have_attribute("aria-pressed", "true")
        else:
            assert page.locator(".drop").count() == 0
            expect(page.locator(".light")).to_contain_text("one.png")
            page.keyboard.press("d")
            expect(page.get_by_text("for this you have to")).to_be_visible()
            refused = page.evaluate(
                "fetch('/page-files/inspections?model=screws', {method: 'POST', headers: {'X-Flawmap': 'page'}})"
                ".then((answer) => answer.status)"
            )
            assert refused == 403
        go(page, f"{server.base}/threshold")
        expect(page.locator(".chart svg")).to_be_visible()
        expect(page.get_by_role("button", name="Save as a new version")).to_have_count(0)
        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_url(f"{server.base}/login")
        context.close()
    row = newest(server)
    assert (row.owner, row.word, row.word_by) == ("the-operate", "good", "the-operate")


def test_whoever_tries_many_wrong_keys_waits(locked, page):
    server, keys = locked
    go(page, f"{server.base}/login")
    for _ in range(10):
        page.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Key")).to_have_value("")
    sign_in(page, server, keys["administer"])
    expect(page.get_by_role("alert")).to_contain_text("Too many wrong keys")


# Training


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a killed process is told by /proc")
def test_a_model_is_trained_through_a_kill_of_everything_and_judges(server, page, drawn, broken_file):
    go(page, f"{server.base}/train")
    choose(page, "A folder on the server", "screws")
    expect(page.locator(".found")).to_contain_text("12 good images to learn from")
    page.get_by_label("Image size").fill("64")
    page.get_by_label("Good parts rejected, in %").fill("20")
    choose(page, "Method", "padim")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.reload()
    expect(page.get_by_role("progressbar")).to_be_visible()
    server.stop()
    (job,) = server.records.jobs(5)
    assert (job.state, job.by) == ("running", "")
    os.killpg(job.process, signal.SIGKILL)
    server.start()
    go(page, f"{server.base}/train")
    expect(page.get_by_text("Training 1: done")).to_be_visible(timeout=90_000)
    assert page.locator(".unusual img").count() > 0
    expect(page.locator(".unusual img").first).to_have_js_property("complete", True)
    answer = page.request.get(f"{server.base}/page-files/trainings/1/report")
    assert answer.ok
    assert "sandbox" in answer.headers["content-security-policy"]
    page.get_by_label("Name of the model").fill("fresh")
    page.get_by_role("button", name="Use this model").click()
    expect(page.get_by_text("fresh is served from now on")).to_be_visible(timeout=90_000)
    number = server.send(broken_file, "fresh")
    assert server.records.get(number).verdict == "defect"
    assert server.records.jobs(1)[0].state == "done"
