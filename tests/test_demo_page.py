"""The demo's page in a real browser: shapes are drawn by hand, and the right class wins.

`KOI_SCREENSHOTS=1` writes the pictures of the documentation anew.
"""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}

expect.set_options(timeout=600_000)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: .ci/install-chromium on Debian"),
]


def ring(x=0.5, y=0.5, wide=0.3, high=0.3):
    angles = [2 * math.pi * part / 36 for part in range(37)]
    return [(x + wide * math.cos(angle), y + high * math.sin(angle)) for angle in angles]


# By letter, two attempts of one hand at each shape: a wheel, a zigzag and a gallows.
EXAMPLES = {
    "A": [ring(), [(0.2, 0.5), (0.8, 0.5)], [(0.5, 0.2), (0.5, 0.8)]],
    "B": [[(0.1, 0.3), (0.3, 0.7), (0.5, 0.3), (0.7, 0.7), (0.9, 0.3)]],
    "C": [[(0.25, 0.9), (0.25, 0.15), (0.75, 0.15), (0.75, 0.4)]],
}
AGAIN = {
    "A": [ring(0.45, 0.55, 0.33, 0.3), [(0.15, 0.6), (0.75, 0.52)], [(0.42, 0.3), (0.5, 0.8)]],
    "B": [[(0.15, 0.4), (0.3, 0.75), (0.52, 0.35), (0.68, 0.8), (0.9, 0.45)]],
    "C": [[(0.3, 0.85), (0.22, 0.2), (0.7, 0.12), (0.72, 0.45)]],
}


@pytest.fixture(scope="module")
def address():
    """Where `koi demo` serves the page, as it says itself."""
    command = [sys.executable, "-c", "from koi.lab.cli import main; main()"]
    command += ["demo", "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[2]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page; what goes wrong on it, or leaves the machine, fails the test."""
    contexts, wrong = [], []

    def request(request):
        if urlsplit(request.url).netloc != urlsplit(address).netloc:
            wrong.append(f"a request to {request.url}")

    def open_(**options):
        context = browser.new_context(**{**DESKTOP, **options})
        context.set_default_timeout(600_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", request)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.locator("#verdict strong")).to_be_visible()
        return page

    open_.wrong = wrong
    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def pad(page, letter):
    """The canvas of a class's pad, or of the new drawing's (None)."""
    return page.locator(f".pad.class-{letter} > canvas" if letter else ".pad.new > canvas")


def draw(page, letter, strokes):
    """Draw on a pad, by mouse."""
    canvas = pad(page, letter)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


def draw_all(page, query):
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator("#hint")).to_contain_text("Draw an example of A, B and C")
    for letter, strokes in EXAMPLES.items():
        draw(page, letter, strokes)
    expect(page.locator("#hint")).to_contain_text("Now draw A, B or C again")
    draw(page, None, query)


def expect_verdict(page, letter):
    expect(page.locator("#verdict strong")).to_have_text(letter)
    expect(page.locator("#bars .best")).to_have_class(f"class-{letter} best")


def screenshot(page, name, **options):
    if os.environ.get("KOI_SCREENSHOTS"):
        page.wait_for_timeout(1000)  # for what is still moving
        page.screenshot(path=IMAGES / f"demo-{name}.png", **options)


def test_shapes_are_drawn_by_mouse_and_the_right_one_wins(open_page):
    page = open_page(color_scheme="light")
    expect(page.locator("#verdict-random strong")).to_be_visible()
    screenshot(page, "light", full_page=True)
    draw_all(page, AGAIN["A"])
    expect_verdict(page, "A")
    expect(page.locator("#bars-random .percent").first).not_to_have_text("")
    for letter in ("B", "C"):
        page.get_by_role("button", name="Clear the pad for the new drawing").click()
        expect(page.locator("#verdict strong")).to_have_count(0)
        expect(page.locator("#verdict-random strong")).to_have_count(0)
        draw(page, None, AGAIN[letter])
        expect_verdict(page, letter)


def test_examples_are_there_on_which_only_practice_helps(open_page):
    """With each ready-made set the practised network is right, and the other is not: it says so."""
    page = open_page()
    expected = {"Hats": "B", "Boats": "B", "Animals": "B", "Coils": "B", "Greek": "A"}
    for name, letter in expected.items():
        page.get_by_role("button", name="Clear all").click()
        page.get_by_role("button", name=name).click()
        expect_verdict(page, letter)
        expect(page.locator("#verdict em")).to_have_text("✓ right")
        expect(page.locator("#verdict-random em")).to_have_text(f"✗ wrong, it is {letter}")
        shown = page.locator("#bars-random li").all_inner_texts()
        parts = {text[0]: int(re.sub(r"\D", "", text[1:])) for text in shown if text[0] != "?"}
        assert max(parts, key=parts.get) != letter
    assert page.locator(".pad").count() == 6


def test_whose_drawing_it_is_decides_whether_the_page_knows_what_is_right(open_page):
    page = open_page()
    mark = page.locator("#verdict em")
    expect(mark).to_have_text("✓ right")
    page.reload()
    expect(mark).to_have_text("✓ right")
    draw(page, None, [[(0.1, 0.1), (0.2, 0.1)]])  # one more stroke, by the visitor
    expect(page.locator("#verdict strong")).to_be_visible()
    expect(mark).to_have_count(0)
    page.keyboard.press("Control+z")
    expect(mark).to_have_text("✓ right")


def pond(page):
    """Show fish, wave and leaf, and nothing drawn again."""
    page.evaluate("""async () => {
        const { drawing } = await import("./shapes.js");
        const examples = ["fish", "wave", "leaf"].map((name) => ({ strokes: drawing(name) }));
        localStorage.setItem("koi-drawings", JSON.stringify({ examples, query: [] }));
    }""")
    page.reload()
    expect(page.locator("#hint")).to_contain_text("Now draw A, B or C again")


NONE_OF_THESE = {
    "star": [[(0.5, 0.08), (0.76, 0.88), (0.1, 0.36), (0.9, 0.36), (0.24, 0.88), (0.5, 0.08)]],
    "dot": [[(0.5, 0.5), (0.51, 0.5)]],
    "square": [[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8), (0.2, 0.2)]],
    "line": [[(0.1, 0.5), (0.9, 0.5)]],
}


def test_what_is_none_of_the_shapes_is_not_called_one(open_page):
    page = open_page()
    pond(page)
    verdict = page.locator("#verdict strong")
    for strokes in NONE_OF_THESE.values():
        draw(page, None, strokes)
        expect(verdict).to_have_text("Not sure")
        expect(page.locator("#verdict span")).to_contain_text("perhaps none of these")
        page.get_by_role("button", name="Clear the pad for the new drawing").click()
        expect(verdict).to_have_count(0)


def test_steps(open_page):
    """The slider changes what is shown of both; step 0 is before any learning."""
    page = open_page()
    shown = {}
    for step in (0, 3):
        page.get_by_label("Learning steps").fill(str(step))
        expect(page.locator("#steps-shown")).to_have_text(str(step))
        for name in ("bars", "bars-random"):
            percents = page.locator(f"#{name} .percent")
            expect(percents.first).not_to_have_text("")
            shown[name, step] = percents.all_inner_texts()
        for chart in ("losses", "beliefs", "beliefs-random"):
            label = re.compile(f"to .* after step {step}")
            expect(page.locator(f"#{chart} svg")).to_have_attribute("aria-label", label)
    assert len(set(map(tuple, shown.values()))) == 4


def test_the_right_words_are_behind_a_small_i(open_page):
    page = open_page()
    word = page.get_by_text("cross entropy")
    expect(word).to_be_hidden()
    page.get_by_label("The right word for mistakes").click()
    expect(word).to_be_visible()
    page.keyboard.press("Escape")
    expect(word).to_be_hidden()


def strokes_on(page):
    """How much is drawn on each pad, in words."""
    labels = page.locator(".pad canvas[role=application]")
    return [each.get_attribute("aria-label") for each in labels.all()]


def test_drawings_survive_a_reload_and_ctrl_z_takes_changes_back(open_page):
    page = open_page()
    states = [strokes_on(page)]
    page.get_by_role("button", name="Clear all").click()
    states.append(strokes_on(page))
    draw(page, "A", EXAMPLES["A"])  # three strokes
    states.append(strokes_on(page))
    page.get_by_role("button", name="One shape more").click()
    states.append(strokes_on(page))
    assert states[2][0] == "the pad of shape A, 3 strokes"
    page.reload()
    expect(page.locator("#hint")).to_contain_text("Draw an example of B, C and D first")
    assert strokes_on(page) == states[3]
    page.get_by_role("button", name="Clear the pad of shape A").click()
    page.keyboard.press("Control+z")
    assert strokes_on(page) == states[3]
    page.keyboard.press("Control+z")  # nothing was changed before, since the reload
    assert strokes_on(page) == states[3]
    draw(page, "B", EXAMPLES["B"])
    draw(page, "C", EXAMPLES["C"])
    page.keyboard.press("Control+z")
    assert strokes_on(page)[1:3] == ["the pad of shape B, one stroke", "the pad of shape C, empty"]


def test_what_is_kept_and_no_drawing_is_passed_over(open_page):
    page = open_page()
    for kept in ("{", '{"examples": []}', '{"examples": [1, 2, 3], "query": []}'):
        page.evaluate("kept => localStorage.setItem('koi-drawings', kept)", kept)
        page.reload()
        expect_verdict(page, "B")


def test_the_learning_is_played_step_by_step(open_page):
    page = open_page()
    page.evaluate("""() => {
        const { dataset } = document.documentElement;
        const output = document.getElementById("steps-shown");
        const note = () => (dataset.seen = `${dataset.seen ?? ""}${output.textContent} `);
        new MutationObserver(note).observe(output, { childList: true });
    }""")
    page.get_by_role("button", name="Play the learning").click()
    expect(page.locator("html")).to_have_attribute("data-seen", "0 1 2 3 ")


def test_from_three_to_five_shapes(open_page):
    page = open_page()
    fewer = page.get_by_role("button", name="One shape fewer")
    more = page.get_by_role("button", name="One shape more")
    expect(fewer).to_be_disabled()
    more.click()
    expect(page.locator("#hint")).to_have_text("Draw an example of D first.")
    more.click()
    expect(more).to_be_disabled()
    expect(page.locator("#bars li")).to_have_count(6)  # and none of these
    fewer.click()
    draw(page, "D", EXAMPLES["C"])
    page.get_by_role("button", name="Clear the pad for the new drawing").click()
    draw(page, None, AGAIN["C"])
    expect_verdict(page, "D")


def test_by_keyboard_alone(open_page):
    """From the first pad by Tab; a shape of one's own by arrow keys, one drawn by the page."""
    page = open_page()
    pad(page, "A").focus()
    keys = page.keyboard
    keys.press("Delete")
    expect(pad(page, "A")).to_have_attribute("aria-label", "the pad of shape A, empty")
    keys.press("Space")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        for _ in range(6):
            keys.press(key)
    keys.press("Space")
    keys.press("Shift+ArrowUp")
    keys.press("Space")
    keys.press("ArrowUp")
    expect(pad(page, "A")).to_have_attribute(
        "aria-label", "the pad of shape A, 2 strokes, pen down"
    )
    keys.press("Backspace")
    expect(pad(page, "A")).to_have_attribute("aria-label", "the pad of shape A, one stroke")
    keys.press("Tab")
    keys.press("Enter")  # the leaf above the next pad
    expect(page.locator("#spoken")).to_contain_text("Practised: ")
    tabs, reached = 0, set()
    while tabs < 60 and "play" not in reached:
        keys.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        tabs += 1
    assert {"steps", "play"} <= reached


def test_by_touch_on_a_phone(open_page):
    page = open_page(**PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    pond(page)
    canvas = pad(page, None)
    canvas.scroll_into_view_if_needed()
    box, top = canvas.bounding_box(), page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)

    def send(kind, *points):
        touch.send(
            "Input.dispatchTouchEvent",
            {
                "type": f"touch{kind}",
                "touchPoints": [
                    {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
                    for x, y in points
                ],
            },
        )

    fish = [(0.88, 0.3), (0.6, 0.5), (0.3, 0.68), (0.1, 0.5), (0.3, 0.3), (0.6, 0.5), (0.88, 0.7)]
    send("Start", fish[0])
    for (x, y), (to_x, to_y) in itertools.pairwise(fish):
        for part in (0.25, 0.5, 0.75, 1):
            send("Move", (x + part * (to_x - x), y + part * (to_y - y)))
    send("End")
    assert page.evaluate("scrollY") == top  # drawing does not scroll
    expect(canvas).to_have_attribute("aria-label", "the pad for the new drawing, one stroke")
    expect_verdict(page, "A")
    page.locator(".ask").evaluate("section => section.scrollIntoView()")
    screenshot(page, "phone")


def test_light_and_dark_by_a_button_that_is_remembered(open_page):
    page = open_page(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Dark colours").click()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    expect(page.locator("#verdict strong")).to_be_visible()
    assert page.evaluate(background) == dark
    page = open_page(color_scheme="dark")
    expect(page.locator("#verdict-random strong")).to_be_visible()
    assert page.evaluate(background) == dark
    screenshot(page, "dark", full_page=True)


def test_an_answer_that_fails_is_said_and_the_next_one_is_shown(open_page, address):
    page = open_page()
    page.route("**/answer", lambda route: route.fulfill(status=422, json={"error": "too odd"}))
    draw(page, None, AGAIN["B"])
    expect(page.locator("#hint")).to_have_text("That did not work: too odd.")
    page.unroute("**/answer")
    page.get_by_role("button", name="Draw something on the pad for the new drawing").click()
    expect_verdict(page, "A")
    assert all("422" in each for each in open_page.wrong)  # Chromium's own word on it
    open_page.wrong.clear()
