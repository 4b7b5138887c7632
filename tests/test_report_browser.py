"""The page in a real browser: no errors, charts with a size, an image at the pointer, light and dark, wide and narrow.

Skipped where neither `chromium` nor `google-chrome` is installed.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_experiment import built_experiment

from pipeline.report.pictures import DOT_SIDE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
)

WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message || event.target.src)), true);
addEventListener("securitypolicyviolation", (event) => problems.push("blocked " + event.blockedURI));
</script>"""

EXAMINE = """<script>
addEventListener("load", () => {
  const box = (element) => { const { width, height } = element.getBoundingClientRect(); return [width, height]; };
  const found = { problems, ready: document.documentElement.dataset.ready, theme: document.documentElement.dataset.theme };
  const folded = [...document.querySelectorAll("details")];
  found.folded = folded.map((part) => part.open);
  dispatchEvent(new Event("beforeprint"));
  found.printed = folded.map((part) => part.open);
  dispatchEvent(new Event("afterprint"));
  found.after = folded.map((part) => part.open);
  found.screen = { next: document.querySelector(".next ol").getBoundingClientRect().bottom, height: innerHeight };
  folded.forEach((part) => { part.open = true; });
  found.charts = Object.fromEntries([...document.querySelectorAll("svg.chart")].map((svg) => [svg.dataset.chart, box(svg)]));
  found.letters = [...document.querySelectorAll("svg.chart text")].map((text) => {
    const svg = text.ownerSVGElement;
    return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  });
  found.scrolls = [...document.querySelectorAll(".scroll")].map((part) => [part.scrollWidth > part.clientWidth, getComputedStyle(part).backgroundImage.split("linear-gradient").length - 1]);
  found.overflow = document.documentElement.scrollWidth - innerWidth;
  found.background = getComputedStyle(document.body).backgroundColor;
  found.ink = getComputedStyle(document.querySelector("h1")).color;
  found.images = [...document.images].map((image) => image.naturalWidth);
  const tip = document.getElementById("tip");
  const shown = () => tip.style.visibility === "visible";
  const over = (element, name) => {
    const { left, top, width, height } = element.getBoundingClientRect();
    element.dispatchEvent(new PointerEvent(name, { bubbles: true, clientX: left + width / 2, clientY: top + height / 2 }));
  };
  const map = document.querySelector('[data-chart="map"]');
  map.scrollIntoView();
  const dots = map.querySelectorAll('[id$="-dots"] use');
  const data = JSON.parse(document.getElementById("images").textContent);
  found.dots = dots.length;
  over(dots[7], "pointermove");
  const thumb = tip.querySelector(".thumb");
  found.hover = { shown: shown(), text: tip.textContent, image: thumb && thumb.style.backgroundImage.slice(0, 30), paths: data.paths };
  const sheet = new Image();
  const dialog = document.getElementById("image");
  const inside = () => [...dialog.querySelectorAll("figure figcaption b")].map((name) => name.textContent);
  document.querySelector("#mistakes .frame, #labels .frame").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  found.opened = { open: dialog.open, neighbours: inside(), focus: document.activeElement.className };
  dialog.querySelector("figure .frame").click();
  found.walkedOn = { open: dialog.open, text: dialog.querySelector(".about").textContent };
  dialog.close();
  const facet = (name) => document.querySelector(`#map .facets select[aria-label="${name}"]`);
  const browse = () => [...document.querySelectorAll("#browse figure")].map((figure) => figure.textContent);
  const choose = (name, value) => { facet(name).value = value; facet(name).dispatchEvent(new Event("change")); };
  found.browse = { all: browse().length, options: [...facet("Mistake").options].map((option) => option.value) };
  choose("Split", "test"); choose("Answer", "wrong");
  found.browse.wrong = browse();
  found.browse.count = document.querySelector("#map .facets [role=status]").textContent;
  choose("Split", ""); choose("Answer", "");
  document.querySelectorAll("#map-classes button")[1].click();
  found.faded = [...dots].filter((dot) => dot.style.opacity).length;
  found.others = data.codes.filter((codes) => !codes.includes(1)).length;
  const bar = document.querySelector('[data-chart="leaderboard"] .tip');
  over(bar, "pointerover");
  found.bar = { shown: shown(), text: tip.textContent };
  const header = [...document.querySelectorAll("#leaderboard thead th")][3];
  const column = () => [...document.querySelectorAll("#leaderboard tbody tr")].map((row) => Number(row.cells[3].dataset.v));
  header.click(); found.descending = column();
  header.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" })); found.ascending = column();
  const score = document.querySelector("#leaderboard tbody tr").cells[2];
  found.score = { text: score.textContent, right: score.getBoundingClientRect().right, width: innerWidth };
  bar.dispatchEvent(new PointerEvent("pointerout", { bubbles: true, pointerType: "mouse" }));
  found.mouse = shown();
  bar.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "touch" }));
  bar.dispatchEvent(new PointerEvent("pointerout", { bubbles: true, pointerType: "touch" }));
  found.touched = shown();
  document.querySelector("h1").dispatchEvent(new PointerEvent("pointerdown", { bubbles: true, pointerType: "touch" }));
  found.elsewhere = shown();
  const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const matrix = document.querySelector('[data-chart="confusion"]');
  const cells = [...matrix.querySelectorAll(".tip")];
  found.stops = matrix.querySelectorAll('[tabindex="0"]').length;
  cells[0].focus();
  press(cells[0], "ArrowRight");
  found.arrow = { text: tip.textContent, next: cells[1].dataset.tip, label: cells[1].getAttribute("aria-label"), shown: shown() };
  press(cells[1], "Escape");
  found.escaped = !shown();
  press(map, "ArrowRight");
  found.walked = { shown: shown(), text: tip.textContent, paths: data.paths.filter((_, dot) => data.codes[dot].includes(1)) };
  folded.forEach((part) => { part.open = false; });
  document.querySelector('nav a[href="#classes"]').click();
  document.getElementById("theme").click();
  found.toggled = document.documentElement.dataset.theme;
  sheet.onload = () => {
    found.sheet = [sheet.naturalWidth, sheet.naturalHeight];
    found.unfolded = folded.filter((part) => part.open).map((part) => part.querySelector(":scope > [id]").id);
    parent.postMessage(JSON.stringify(found), "*");
  };
  sheet.src = data.sheet;
});
</script>"""


FRAME = """<!doctype html><style>body { margin: 0 } iframe { border: 0; width: WIDTHpx; height: 900px }</style>
<script>addEventListener("message", (event) => {
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = event.data;
  document.body.append(result);
});</script><iframe src="PAGE"></iframe>"""
"""A browser's window is never as narrow as a phone; a frame is."""


def look(page: Path, folder: Path, width: int, theme: str) -> tuple[dict[str, Any], str]:
    """Open the page from disk with a probe inside; return what the probe saw and what the browser logged."""
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    probed.write_text(
        text.replace("<title>", WATCH + "<title>", 1).replace("</body>", EXAMINE + "</body>", 1), encoding="utf-8"
    )
    frame = folder / "frame.html"
    address = f"{probed.as_uri()}?theme={theme}"
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", address), encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},900",
            "--virtual-time-budget=20000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, f"the probe did not finish: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found.group(1))), done.stderr


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_experiment(tmp_path_factory.getbasetemp() / "experiment")


@pytest.fixture(scope="module")
def wide(experiment: Path, tmp_path_factory: pytest.TempPathFactory):
    return look(experiment / "report.html", tmp_path_factory.mktemp("wide"), 1280, "light")


@pytest.fixture(scope="module")
def narrow(experiment: Path, tmp_path_factory: pytest.TempPathFactory):
    return look(experiment / "report.html", tmp_path_factory.mktemp("narrow"), 390, "dark")


def test_page_loads_without_errors(wide, narrow):
    for found, log in (wide, narrow):
        assert found["ready"] == "yes"
        assert found["problems"] == []
        assert [line for line in log.splitlines() if "CONSOLE" in line] == []


def test_every_chart_is_there_and_fits(wide, narrow):
    for found, _ in (wide, narrow):
        assert set(found["charts"]) == {
            "leaderboard",
            "differences",
            "tuning",
            "confusion",
            "reliability",
            "learning_curve",
            "cost",
            "map",
        }
        assert all(width > 200 and height > 60 for width, height in found["charts"].values())
        assert found["overflow"] <= 0, "the page scrolls sideways"


def test_every_thumbnail_can_be_shown(wide):
    found, _ = wide
    assert len(found["images"]) >= 6
    assert all(width > 0 for width in found["images"])


def test_pointing_at_a_dot_shows_its_image(wide):
    found, _ = wide
    assert found["dots"] == 180
    assert found["hover"]["shown"]
    assert found["hover"]["image"].startswith('url("data:image/webp;base64,')
    assert any(path in found["hover"]["text"] for path in found["hover"]["paths"])
    assert found["sheet"][0] % DOT_SIDE == 0
    assert found["sheet"][0] * found["sheet"][1] >= 180 * DOT_SIDE**2


def test_choosing_a_class_fades_the_others(wide):
    found, _ = wide
    assert 0 < found["faded"] == found["others"] < found["dots"]


def test_charts_have_tooltips_and_tables_sort(wide):
    found, _ = wide
    assert found["bar"]["shown"]
    assert "cross-validation" in found["bar"]["text"]
    assert found["descending"] == sorted(found["descending"], reverse=True)
    assert found["ascending"] == sorted(found["ascending"])


def test_light_and_dark_are_different_and_readable(wide, narrow):
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    light, dark = wide[0], narrow[0]
    assert (light["theme"], light["toggled"]) == ("light", "dark")
    assert (dark["theme"], dark["toggled"]) == ("dark", "light")
    assert brightness(light["background"]) > 200 > brightness(light["ink"]) + 100
    assert brightness(dark["background"]) < 60 < brightness(dark["ink"]) - 100


def test_a_phone_shows_the_score_with_its_interval_without_scrolling(narrow):
    score = narrow[0]["score"]
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", score["text"])
    assert score["width"] == 390
    assert score["right"] <= 390


def test_the_first_screen_says_what_to_do_next(wide):
    assert wide[0]["screen"]["next"] < wide[0]["screen"]["height"]


def test_letters_of_charts_can_be_read_on_a_phone_and_wide_tables_show_that_they_scroll(wide, narrow):
    for found, _ in (wide, narrow):
        assert min(found["letters"]) >= 10
        assert all(shadows == 4 for _, shadows in found["scrolls"])
    assert any(wider for wider, _ in narrow[0]["scrolls"])


def test_a_link_opens_the_part_that_it_leads_to(wide):
    assert wide[0]["unfolded"] == ["classes"]


def test_an_image_that_is_pressed_shows_its_neighbours_and_these_theirs(wide, narrow):
    for found, _ in (wide, narrow):
        assert found["opened"]["open"]
        assert found["opened"]["focus"] == "close"
        assert len(found["opened"]["neighbours"]) == 6
        assert found["walkedOn"]["open"]
        assert found["walkedOn"]["text"].startswith(found["opened"]["neighbours"][0])


def test_the_gallery_is_filtered_by_split_and_answer(wide):
    found = wide[0]["browse"]
    assert found["all"] == 48
    assert found["count"] == f"{len(found['wrong'])} of 180"
    assert 0 < len(found["wrong"]) < 30
    assert all("test" in text and "said" in text for text in found["wrong"])
    assert any(" → " in option for option in found["options"])


def test_what_a_finger_showed_stays_until_it_touches_elsewhere(wide):
    found, _ = wide
    assert not found["mouse"]
    assert found["touched"]
    assert not found["elsewhere"]


def test_the_keyboard_stops_once_at_a_chart_and_walks_its_marks(wide):
    found, _ = wide
    assert found["stops"] == 1
    assert found["arrow"]["shown"]
    assert found["arrow"]["text"] == found["arrow"]["next"] == found["arrow"]["label"]
    assert found["escaped"]
    assert found["walked"]["shown"]
    assert any(path in found["walked"]["text"] for path in found["walked"]["paths"])


def test_paper_shows_what_the_screen_folds_away(wide):
    found, _ = wide
    assert not any(found["folded"])
    assert len(found["printed"]) >= 12
    assert all(found["printed"])
    assert found["after"] == found["folded"]
