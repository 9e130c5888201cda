"""lab/page.html as lab/analyze.py fills it in: hostile text stays text."""

import html.parser

import numpy as np

from lab.analyze import TEXT, Reading, page


class Parsed(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, and its text."""
    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onmouseover=\"alert(1)", "'&amp;", "\x00\x1b[31m",
           "\u202eabc", "\u200b\u2066", "\ud800", "\n", "א", "]]>-->", "x" * 100_000]


def hostile_reading():
    return Reading(0, "".join(HOSTILE), list(range(12)), HOSTILE, ["causal"] + ["other"] * 11, [(0, 2, "verify")],
                   np.linspace(0, 2, 12), [[(t, 0.5), ("b", 0.3), ("c", 0.2)] for t in HOSTILE], 1.0)


def test_page_keeps_hostile_text_as_text():
    source = page([{"</h3><script>": hostile_reading()}], TEXT)
    source.encode("utf-8")                                      # no lone surrogates
    parsed = Parsed(source)
    assert {tag for tag, _ in parsed.elements} == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span"}
    assert {name for _, attributes in parsed.elements for name in attributes} == {
        "lang", "charset", "http-equiv", "content", "class", "style", "data-h", "dir"}
    assert "url(" not in source and "http:" not in source and "https:" not in source
    assert not set(source) & {"\x00", "\x1b", "\u202e", "\u200b", "\u2066"} and len(source) < 30_000
    for shown in ("</script><script>alert(1)</script>", "⟨U+0000⟩⟨U+001B⟩[31m", "⟨U+202E⟩abc", "⟨U+D800⟩", "⏎\n",
                  "⟨99,800 more characters⟩"):
        assert shown in parsed.text
    tokens = [a for tag, a in parsed.elements if tag == "span" and "data-h" in a]
    assert [a["class"] for a in tokens[:3]] == ["t p r", "t r", "t"] and len(tokens) == 12
    assert tokens[0]["data-h"].split("\n") == ["0.000 nats, token 1", "causal; sentence: verify",
                                               " 50.00%  </script><script>alert(1)</script>", " 30.00%  b", " 20.00%  c"]
    assert tokens[0]["style"].endswith(",0.00)") and tokens[11]["style"].endswith(",1.00)")


def test_a_page_of_an_endless_response_is_not_endless():
    r = Reading(0, "p", [0] * 100_000, ["x"] * 100_000, ["other"] * 100_000, [], np.ones(100_000), [[]] * 100_000, 1.0)
    parsed = Parsed(page([{"a": r, "b": r}], TEXT))
    assert sum("data-h" in a for _, a in parsed.elements) == 20_000 and parsed.text.count("⟨10,000 of 100,000 tokens⟩") == 2
