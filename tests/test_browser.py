"""Pages in headless Chromium, where one is installed: no errors, no requests, tips, filters, three widths."""

import re
import shutil
import subprocess

import pytest

from bytecap.report.fit import page
from conftest import BUDGET

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium in PATH"),
]
ACTS = """<script>
const mark = document.querySelector("#owners [data-tip]");
mark.dispatchEvent(new MouseEvent("mouseenter"));
const hover = document.getElementById("tip").textContent === mark.dataset.tip;
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
mark.focus();
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const moved = document.activeElement !== mark && document.getElementById("tip").textContent !== mark.dataset.tip;
const box = document.querySelector("input[data-filters=owners]"), table = document.getElementById("owners");
box.value = "layers.1"; box.dispatchEvent(new Event("input"));
const shown = [...table.tBodies[0].rows].filter((r) => !r.hidden);
const filtered = shown.length > 0 && shown.every((r) => r.textContent.includes("layers.1"));
table.querySelectorAll("th button")[2].click();
const sizes = [...table.tBodies[0].rows].map((r) => Number(r.cells[2].textContent.replace(/,/g, "")));
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


@pytest.fixture(scope="module")
def written(fitted, tmp_path_factory):
    result, _ = fitted("rotary", "bytecap", BUDGET)
    path = tmp_path_factory.mktemp("pages") / "fit.html"
    path.write_text(page(result.report, result.ledger()).replace("</body>", ACTS), "utf-8")
    return path


@pytest.mark.parametrize("width", [500, 900, 1400])
def test_it_works_at_every_width(written, tmp_path, width):
    picture = tmp_path / "page.png"
    out = browse(tmp_path, written, "--dump-dom", f"--window-size={width},1200")
    title = re.search(r"<title>(\{.*?\})</title>", out)
    assert title, out[:300]
    assert title[1] == '{"hover":true,"moved":true,"filtered":true,"sorted":true,"narrow":true}'
    browse(tmp_path, written, f"--screenshot={picture}", f"--window-size={width},1200")
    assert picture.stat().st_size > 10_000
