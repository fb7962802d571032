"""Check on a page's text what every page promises."""

from html.parser import HTMLParser


class Strict(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to."""

    void = frozenset({"meta", "input", "link", "br", "wbr"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.names, self.tips, self.tabs = [], [], [], [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [v for k, v in attributes if k in {"src", "href", "xlink:href", "action"}]
        self.tabs += values.get("tabindex") == "0"
        if values.get("data-tip"):
            assert values["aria-label"] == values["data-tip"]
            self.tips.append(values["data-tip"])
        if "id" in values:
            self.names.append(values["id"])
        if tag not in self.void and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sound(text):
    """A parsed page, after checking what every page promises."""
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert parser.links == []
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(text.encode()) < 2_000_000
    assert len(parser.names) == len(set(parser.names))
    return parser
