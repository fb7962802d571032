"""Names from models, files and lines never become markup, on any page; nor does rubbish in lines become a traceback."""

import copy
import json
from html.parser import HTMLParser

import pytest

from bytecap.errors import BytecapError
from bytecap.report import notebook
from bytecap.report.comparison import page as comparison_page
from bytecap.report.curves import page as curves_page
from bytecap.report.fit import page as fit_page
from bytecap.report.thesis import page as thesis_page
from bytecap_lab import compare, thesis
from bytecap_lab.thesis.verdicts import judge
from synthetic import comparison_lines, curves_figures
from test_thesis import lines as thesis_lines

HOSTILE = """zz<img src=x onerror='a("b")'> & <script> -->"""
PLAIN = "".join(c if c.isalnum() or c == " " else "z" for c in HOSTILE)


class Markup(HTMLParser):
    """The markup of a page without its words: tags, names of attributes, and the text of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))
        self.inside = tag if tag in {"script", "style"} else ""

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        self.found.append(("/", tag))
        self.inside = ""

    def handle_data(self, data):
        if self.inside:
            self.found.append(data)

    def handle_comment(self, data):
        self.found.append(("comment", data))


def markup(text):
    parser = Markup()
    parser.feed(text)
    parser.close()
    return parser.found


def words(value, place=()):
    """Texts in a value, keys included, one for every place; items of a list are in one place, and so are most keys."""
    found = {}
    if isinstance(value, dict):
        for k, v in value.items():
            found.setdefault((*place, "key"), k)
            found |= {p: w for p, w in words(v, (*place, k if len(value) < 12 else "")).items() if p not in found}
    elif isinstance(value, list | tuple):
        for v in value:
            found |= {p: w for p, w in words(v, (*place, 0)).items() if p not in found}
    elif isinstance(value, str):
        found[place] = value
    return found


def replaced(value, old, new):
    if isinstance(value, dict):
        return {replaced(k, old, new): replaced(v, old, new) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(v, old, new) for v in value]
    return new if value == old and isinstance(value, str) else value


def compared(tmp_path):
    compare.render(comparison_lines(tmp_path / "runs.jsonl"), tmp_path)
    return json.loads((tmp_path / "compare.json").read_text("utf-8"))


@pytest.fixture(params=["fit", "curves", "compare", "thesis"])
def figures(request, tmp_path, fitted):
    """(function that makes a page, figures that it is made of)."""
    if request.param == "fit":
        found, ledger = fitted("rotary", "bytecap")[0], fitted("rotary", "bytecap")[0].ledger()
        return lambda report: fit_page(report, ledger), copy.deepcopy(found.report)
    if request.param == "curves":
        return curves_page, curves_figures()
    if request.param == "compare":
        return comparison_page, compared(tmp_path)
    return thesis_page, judge(thesis_lines() + thesis_lines("golf"))


@pytest.mark.slow
def test_no_text_becomes_markup(figures):
    """One text after another is replaced by markup, and by letters: the page's markup is the same."""
    page, found = figures
    shown = 0
    for word in sorted(set(words(found).values())):
        try:
            plain = page(replaced(found, word, PLAIN))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError):
            continue  # a name of ours, which is looked up
        hostile = page(replaced(found, word, HOSTILE))
        assert "<img" not in hostile, word
        assert markup(plain) == markup(hostile), word
        shown += PLAIN in plain
    assert shown >= 2


def test_no_name_of_a_unit_becomes_markup(fitted):
    from dataclasses import replace

    found = fitted("rotary", "bytecap")[0]
    pages = []
    for name in (PLAIN, HOSTILE):
        entries = [replace(e, unit=f"{name}{i}") if e.unit else e for i, e in enumerate(found.ledger())]
        text = fit_page(found.report, entries) + notebook.ledger(entries, name)
        assert "<img" not in text
        pages.append(markup(text))
    assert pages[0] == pages[1]


RUBBISH = (None, [], {}, 3, -1.0, "x", True, [[1]], {"a": 1}, "9" * 400, 10**30, float("nan"))


def spoiled(records):
    """Records of which one member at a time is missing or something else."""
    seen = set()
    for number, record in enumerate(records):
        for key in record:
            kind = (record["record"], record.get("what"), key)
            if kind not in seen:
                seen.add(kind)
                yield [*records[:number], {k: v for k, v in record.items() if k != key}, *records[number + 1 :]]
                value = RUBBISH[len(seen) % len(RUBBISH)]
                yield [*records[:number], record | {key: value}, *records[number + 1 :]]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["compare", "thesis"])
def test_lines_that_no_run_has_written(kind, tmp_path):
    """A page and figures, or one line that names the file."""
    path, faults = tmp_path / "lines.jsonl", 0
    if kind == "compare":
        comparison_lines(path, ("m",), 1)
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        records = thesis_lines()
    render = compare.render if kind == "compare" else thesis.render
    for changed in spoiled(records):
        path.write_text("".join(json.dumps(r) + "\n" for r in changed), "utf-8")
        said = str(path)
        try:
            render(path, tmp_path / "out")
        except BytecapError as exc:
            said = str(exc)
        assert str(path) in said
        faults += "a line that no run has written" in said
    assert faults > 10


CONTROLS = "zz\x1b[2J\x1b]0;t\x07[bold]\u202e\r\n\x9b31m"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compare", "thesis"])
def test_names_in_lines_do_not_speak_to_the_terminal(kind, tmp_path, run):
    path, shown = tmp_path / "lines.jsonl", 0
    if kind == "compare":
        comparison_lines(path, ("m",), 1)
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        records = thesis_lines()
    free = {r[k] for r in records for k in ("model", "method", "host", "command", "base") if isinstance(r.get(k), str)}
    free |= {task for r in records for task in r.get("tasks", ())}
    for word in sorted(free | {t["name"] for r in records for t in r.get("texts", ()) if "name" in t}):
        changed = replaced(records, word, CONTROLS)
        path.write_text("".join(json.dumps(r) + "\n" for r in changed), "utf-8")
        _, out, err = run(kind, "--from", path, "-o", tmp_path / "out")
        for text in (out, err):
            assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(text), word
        shown += "[bold]" in out
    assert shown
