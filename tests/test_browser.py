"""Pages in headless Chromium, where one is installed: no errors, no requests, tips, filters, three widths."""

import re
import shutil
import subprocess

import pytest

from bytecap.curves import byte_returns
from bytecap.report.fit import page
from conftest import BUDGET, SMALL

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium in PATH"),
]
ACTS = """<script>
const mark = document.querySelector(MARK);
mark.dispatchEvent(new MouseEvent("mouseenter"));
const hover = document.getElementById("tip").textContent === mark.dataset.tip;
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
mark.focus();
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const moved = document.activeElement !== mark && document.getElementById("tip").textContent !== mark.dataset.tip;
const box = document.querySelector(`input[data-filters=${NAME}]`), table = document.getElementById(NAME);
box.value = "layers.1"; box.dispatchEvent(new Event("input"));
const shown = [...table.tBodies[0].rows].filter((r) => !r.hidden);
const filtered = shown.length > 0 && shown.every((r) => r.textContent.includes("layers.1"));
table.querySelectorAll("th button")[COLUMN].click();
const sizes = [...table.tBodies[0].rows].map((r) =>
  Number((r.cells[COLUMN].dataset.value ?? r.cells[COLUMN].textContent).replace(/,/g, "")));
const sorted = sizes.every((n, i) => !i || sizes[i - 1] <= n);
const narrow = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify({hover, moved, filtered, sorted, narrow});
</script></body>"""


def browse(directory, path, *options):
    options = (*options, f"--user-data-dir={directory / 'profile'}", "--enable-logging=stderr", path.as_uri())
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)  # noqa: S603
    assert not re.search(r"Uncaught|violates|Refused|net::ERR", found.stderr), found.stderr
    return found.stdout


def acting(text, mark, name, column):
    """A page that tries its own tips, filter and sorting, and says how it went in its title."""
    values = f"<script>const MARK = {mark!r}, NAME = {name!r}, COLUMN = {column};</script>"
    return text.replace("</body>", values + ACTS)


@pytest.fixture(scope="module")
def written(fitted, model_directory, texts, tmp_path_factory):
    """Function: path of the page of a kind."""
    directory, made = tmp_path_factory.mktemp("pages"), {}

    def get(kind):
        if kind not in made:
            made[kind] = directory / f"{kind}.html"
            if kind == "fit":
                result, _ = fitted("rotary", "bytecap", BUDGET)
                text = acting(page(result.report, result.ledger()), "#owners [data-tip]", "owners", 2)
            else:
                files = {"calibration": texts["calib"], "evaluation": texts["val"]}
                byte_returns(model_directory("rotary"), BUDGET, **files, paths=["rows"], points=4, point_tokens=300,
                             report=made[kind], **SMALL)  # fmt: skip
                text = acting(made[kind].read_text("utf-8"), "figure [data-tip]", "units", 2)
            made[kind].write_text(text, "utf-8")
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["fit", "curves"])
@pytest.mark.parametrize("width", [500, 900, 1400])
def test_it_works_at_every_width(written, tmp_path, width, kind):
    picture = tmp_path / "page.png"
    out = browse(tmp_path, written(kind), "--dump-dom", f"--window-size={width},1200")
    title = re.search(r"<title>(\{.*?\})</title>", out)
    assert title, out[:300]
    assert title[1] == '{"hover":true,"moved":true,"filtered":true,"sorted":true,"narrow":true}'
    browse(tmp_path, written(kind), f"--screenshot={picture}", f"--window-size={width},1200")
    assert picture.stat().st_size > 10_000
