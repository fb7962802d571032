"""Pages in headless Chromium, where one is installed: no errors, no requests, tips, filters, three widths, two schemes.

Pointer and keys are the browser's own. Comparison and curves are made up (`synthetic`), the thesis is drawn from
committed lines, the fit is of a tiny model.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bytecap.report.curves import page as curves_page
from bytecap.report.fit import page as fit_page
from bytecap.report.svg import DARK, colour
from bytecap_lab import compare, thesis
from chromium import BROWSER, Chromium
from pages import sound
from synthetic import comparison_lines, curves_figures

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no Chromium in PATH"), pytest.mark.browser]
LINES = Path(__file__).parents[1] / "results" / "thesis" / "demo.jsonl"
# page -> a table, a column of numbers, its title's place, a word of some of its rows, and where marks with tips are
PAGES = {
    "fit": ("owners", 2, "layers.1", "#owners"),
    "curves": ("units", 3, "layers.1", "figure"),
    "compare": ("wins-models-small", 0, "literature", "figure"),
    "thesis": ("operating", 6, "golf", "figure"),
}
WIDTHS = (390, 900, 1400)
HELPERS = """(() => {
  window.seen = (e) => e.getClientRects().length > 0;
  window.settled = () => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(true))));
  window.middle = async (e) => {
    e.scrollIntoView({block: "center"}); await settled(); const b = e.getBoundingClientRect();
    return [b.x + b.width / 2, b.y + b.height / 2];
  };
  window.uncovered = async (s) => {
    for (const e of [...document.querySelectorAll(s)].filter(seen))
      if (e.contains(document.elementFromPoint(...await middle(e)))) return e;
  };
  window.tip = () => document.getElementById("tip");
  window.told = () => { const b = tip().getBoundingClientRect();
    return tip().hidden ? null : [tip().textContent, b.left >= 0 && b.right <= innerWidth && b.top >= 0
      && b.bottom <= innerHeight]; };
})()"""
SHAPE = """(() => {
  const all = (s, at = document) => [...at.querySelectorAll(s)].filter(seen), cut = [], crossed = [];
  const boxes = (s, at) => all(s, at).map((e) => [e.textContent.trim(), e.getBoundingClientRect()]);
  for (const svg of all("figure svg")) {
    const r = svg.getBoundingClientRect(), marks = boxes("text, circle, polygon, rect, polyline", svg);
    if (r.left < 0 || r.right > innerWidth + .5) cut.push("chart " + svg.getAttribute("aria-label"));
    for (const [t, b] of marks) if (b.left < r.left - 1 || b.right > r.right + 1 || b.top < r.top - 1 ||
      b.bottom > r.bottom + 1) cut.push(t || "a mark of " + svg.getAttribute("aria-label"));
    const words = boxes("text", svg);
    words.forEach(([t, a], i) => words.slice(i + 1).forEach(([u, b]) => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4)
        crossed.push([t, u]); }));
  }
  const row = all(".cards li"), top = row.length && row[0].getBoundingClientRect().top;
  return {
    inner: innerWidth, wide: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight,
    cut, crossed, cards: row.filter((e) => e.getBoundingClientRect().top === top).length,
    broad: all("figure.broad").length, slim: all("figure.slim").length,
    size: Math.min(...all("figure svg text").map((t) => t.getBoundingClientRect().height)),
    charts: all("figure svg").map((s) => { const b = s.getBoundingClientRect();
      return [b.left, b.top + scrollY, b.right, b.bottom + scrollY].map(Math.round); }),
  };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all pages."""
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def written(fitted, tmp_path_factory):
    """Function: path of a page."""
    directory = tmp_path_factory.mktemp("pages")

    def fit():
        result, _ = fitted("rotary", "bytecap")
        return fit_page(result.report, result.ledger())

    def rendered(kind):
        if kind == "compare":
            compare.render(comparison_lines(directory / "runs.jsonl"), directory)
        else:
            thesis.render(LINES, directory)
        return (directory / f"{kind}.html").read_text("utf-8")

    def get(kind):
        path = directory / f"{kind}.html"
        if not path.exists():
            made = {"fit": fit, "curves": lambda: curves_page(curves_figures())}
            text = made[kind]() if kind in made else rendered(kind)
            sound(text)
            path.write_text(text, "utf-8")
        return path

    return get


def opened(browser, path, width, **how):
    """A page at a width, without faults."""
    assert browser.load(path, width, **how) == []
    browser.run(HELPERS)


def tips_follow_pointer_and_keys(browser, marks):
    """Hover shows a mark's figures, arrows go to the next mark, Escape hides them."""
    first = f"uncovered('{marks} [data-tip]')"
    words = browser.run(f"{first}.then((e) => e.dataset.tip)")
    browser.point(*browser.run(f"{first}.then(middle)"))
    browser.run("settled()")
    assert browser.run("told()") == [words, True]
    browser.point(1, 1)
    assert browser.run("told()") is None
    at = f"[...document.querySelectorAll('{marks} [data-tip][tabindex=\"0\"]')].filter(seen)[0]"
    words = browser.run(f"{at}.dataset.tip")
    browser.run(f"{at}.insertAdjacentHTML('beforebegin', '<a id=here tabindex=0></a>')")
    browser.run("document.getElementById('here').focus({preventScroll: true})")
    browser.press("Tab")
    browser.run("settled()")
    assert browser.run("document.activeElement.dataset.tip") == words
    assert browser.run("told()") == [words, True]
    browser.press("ArrowRight")
    browser.run("settled()")
    after = browser.run("document.activeElement.dataset.tip")
    assert after != words
    assert browser.run("told()") == [after, True]
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ArrowLeft", "Escape")
    assert browser.run("[document.activeElement.dataset.tip, told()]") == [words, None]
    browser.run("document.getElementById('here').remove()")


def tables_filter_and_sort(browser, name, column, word):
    """Typing leaves the rows that hold a word; titles sort, by pointer and by Enter, one way and the other."""
    rows = f"[...document.getElementById('{name}').tBodies[0].rows]"
    before = browser.run(f"{rows}.length")
    browser.click(*browser.run(f"middle(document.querySelector('input[data-filters={name}]'))"))
    browser.write(word)
    shown = browser.run(f"{rows}.filter(seen).map((r) => r.textContent)")
    assert 0 < len(shown) < before
    assert all(word in r for r in shown)
    title = f"document.getElementById('{name}').querySelectorAll('th button')[{column}]"
    numbers = f"{rows}.map((r) => parseFloat(r.cells[{column}].textContent.replace(/,/g, '')))"
    browser.run(f"{title}.focus()")
    browser.press("Enter")
    assert browser.run(f"{title}.parentNode.ariaSort") == "ascending"
    found = browser.run(numbers)
    assert found == sorted(found)
    browser.click(*browser.run(f"middle({title})"))
    found = browser.run(numbers)
    assert found == sorted(found, reverse=True)
    assert len(found) == before


@pytest.mark.parametrize("kind", PAGES)
def test_it_works(browser, written, kind):
    name, column, word, marks = PAGES[kind]
    opened(browser, written(kind), 900)
    tips_follow_pointer_and_keys(browser, marks)
    tables_filter_and_sort(browser, name, column, word)
    assert browser.faults(written(kind)) == []
    found = browser.run(SHAPE)
    assert (found["wide"], found["cut"], found["crossed"]) == (900, [], [])


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("kind", PAGES)
def test_it_works_narrow_and_wide(browser, written, kind, width):
    name, column, word, marks = PAGES[kind]
    opened(browser, written(kind), width)
    tips_follow_pointer_and_keys(browser, marks)
    tables_filter_and_sort(browser, name, column, word)
    assert browser.faults(written(kind)) == []


@pytest.mark.parametrize("kind", PAGES)
def test_pictures_at_every_width(browser, written, kind):
    """Nothing is cut, crossed or blank, charts and cards adapt, dark is dark, and the words stay the same."""
    shapes, said, means = {}, set(), {}
    for width in WIDTHS:
        for dark in (False, True):
            opened(browser, written(kind), width, dark=dark)
            shape = shapes[width] = browser.run(SHAPE)
            assert (shape["inner"], shape["wide"], shape["cut"], shape["crossed"]) == (width, width, [], [])
            image = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            picture = np.stack([np.asarray(c, np.int16) for c in image.split()])  # colours first: maxima are fast
            assert picture.shape == (3, shape["high"], width)
            means[width, dark] = picture.mean()
            inks = abs(picture - picture[:, :1, :1]).max(0) > 60
            inked = inks.any(1)  # rows of pixels that hold something
            gaps = np.diff(np.flatnonzero(np.r_[True, inked, True]))
            assert gaps.max() < 160
            for left, top, right, bottom in shape["charts"]:
                part = np.s_[top:bottom, left:right]
                assert (np.ptp(picture[:, *part], axis=0) > 60).sum() > 20 or inks[part].mean() > 0.01
            said.add(browser.run("[...document.querySelectorAll('h1, h2, h3, p, li, td, th')].map((e) => e.textContent)"
                                 ".join()"))  # fmt: skip
    assert len(said) == 1
    assert all(means[w, False] > 180 for w in WIDTHS)
    assert all(means[w, True] < 75 for w in WIDTHS)
    phone, middle, desk = (shapes[w] for w in WIDTHS)
    assert phone["slim"] > 0 == phone["broad"]
    assert (desk["slim"], desk["broad"]) == (middle["slim"], middle["broad"]) == (0, phone["slim"])
    assert 1 <= phone["cards"] < middle["cards"] <= desk["cards"]
    assert all(s["size"] >= 11 for s in shapes.values())
    assert max(x1 - x0 for x0, _, x1, _ in phone["charts"]) < 390 < max(x1 - x0 for x0, _, x1, _ in desk["charts"])


@pytest.mark.parametrize("kind", PAGES)
def test_paper(browser, written, kind):
    """A printed page fits the paper, is light, and has no fields to type in."""
    opened(browser, written(kind), 720, medium="print", dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= 720
    assert browser.run("[...document.querySelectorAll('.wide, .filter')].filter((e) => seen(e) && "
                       "(e.className === 'filter' || e.scrollHeight > e.clientHeight + 1)).length") == 0  # fmt: skip
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_the_ledger_fits_a_desk(browser, written):
    """Nothing of the table of owners has to be scrolled to at 1,200 pixels."""
    opened(browser, written("fit"), 1200)
    box = "document.getElementById('owners').parentNode"
    assert browser.run(f"{box}.scrollWidth - {box}.clientWidth") <= 0


def test_a_broken_page_is_noticed(browser, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text('<title>x</title><img src="http://127.0.0.1:9/x.png"><script>nothing.there</script>', "utf-8")
    found = json.dumps(browser.load(path, 900))
    assert "ReferenceError" in found
    assert "requested http://127.0.0.1:9/x.png" in found


def luminance(text):
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


@pytest.mark.parametrize(("paper", "changed", "least"), [("#0f1318", DARK, 4.5), ("#ffffff", {}, 2.2)])
def test_colours_stand_out(paper, changed, least):
    """On light paper the two lightest colours rely on the outline of their marks."""
    for style in range(-1, 8):
        ink = changed.get(colour(style), colour(style))
        high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, ink
