"""The pages: sizes, links that lead somewhere, and a tour and an index in which nothing is missing."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SRC = ROOT / "src"
WHOLE = {"measures", "experiments"}  # folders, and those of report/, that the tour names as a whole


def test_the_readme_is_short_and_leads_to_the_rounding_and_to_the_allocation():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) <= 6000
    for file in ("quantization/trellis.py", "quantization/scalar.py", "allocation/allocate.py"):
        assert f"](src/bytecap/{file})" in text


def test_the_index_lists_every_page():
    index = (DOCS / "index.md").read_text("utf-8")
    assert "](docs/index.md)" in (ROOT / "README.md").read_text("utf-8")
    assert [p.name for p in sorted(DOCS.glob("*.md")) if p.name != "index.md" and f"({p.name})" not in index] == []


def test_links_lead_somewhere():
    dead = []
    for page in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
        dead += [f"{page.relative_to(ROOT)}: {t}" for t in targets if not (page.parent / t).exists()]
    assert dead == []


def test_the_tour_visits_every_module():
    tour = (DOCS / "tour.md").read_text("utf-8")
    missing = []
    for heading, room in re.findall(
        r"^## `(?:src/bytecap/)?([a-z_/]+)`.*?\n(.*?)(?=^## |\Z)", tour, re.MULTILINE | re.DOTALL
    ):
        folder = SRC / ("bytecap_lab" if "lab" in heading else f"bytecap/{heading}")
        assert folder.is_dir(), heading
        for module in folder.rglob("*.py"):
            whole = module.parent.name in WHOLE or module.parent.parent.name == "report"
            if module.name != "__init__.py" and not whole and f"`{module.name}`" not in room:
                missing.append(str(module.relative_to(SRC)))
    rooms = {p.name for p in (SRC / "bytecap").iterdir() if (p / "__init__.py").exists()}
    assert sorted(missing) == []
    assert [r for r in sorted(rooms) if f"## `{r}/`" not in tour] == []


def test_paths_named_on_the_pages_exist():
    named = set()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        text = page.read_text("utf-8")
        named |= {(page.name, p) for p in re.findall(r"`((?:src|tests|benchmarks|results|examples)/[\w./-]+)`", text)}
    allowed = {"src/bytecap/format/coders/ternary.py", "tests/test_ternary.py"}  # the example of CONTRIBUTING.md
    assert sorted((page, p) for page, p in named if p not in allowed and not (ROOT / p).exists()) == []


def test_every_row_of_where_it_runs_has_a_test_with_the_real_program():
    table = (ROOT / "README.md").read_text("utf-8").partition("| where it runs |")[2]
    rows = re.findall(r"^\| (.+?) \| .+? \| `(tests/\w+\.py)` \|$", table, re.MULTILINE)
    programs = {
        "llama.cpp": "llama_cpp", "MLX; compressed-tensors": "mlx_lm", "transformers, hubs": "AutoModelForCausalLM",
        "lm-evaluation-harness": "lm_eval", "a browser": "Chromium",
    }  # fmt: skip
    assert [name for name, _ in rows] == list(programs)
    for name, file in rows:
        assert programs[name] in (ROOT / file).read_text("utf-8"), file


def test_docstrings_say_what_they_describe_at_once():
    beginning = re.compile('"' * 3 + r"What\b")
    sources = (p for folder in ("src", "tests", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))
    assert [str(p.relative_to(ROOT)) for p in sources if beginning.search(p.read_text("utf-8"))] == []


def test_no_page_holds_what_a_merge_left_open():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    left = re.compile(r"^(<{7} |>{7} )", re.MULTILINE)
    assert [str(p.relative_to(ROOT)) for p in pages if left.search(p.read_text("utf-8"))] == []


def test_the_log_has_short_lines_and_dated_titles():
    lines = (ROOT / "LOG.md").read_text("utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|")] == []
    assert all(re.match(r"## \d{4}-\d{2}-\d{2}", x) for x in lines if x.startswith("## "))


def test_no_page_is_committed_that_can_be_rendered():
    assert sorted(p.name for p in (ROOT / "results").rglob("*.html")) == []
