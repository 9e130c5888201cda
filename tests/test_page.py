"""lab/page.py and lab/page.html: hostile text stays text, as a parser of HTML sees it."""

import html.parser

import numpy as np
import pytest

from lab.exploration import TEXT, Span
from lab.page import page
from lab.reading import Reading


class Parsed(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, and its text."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def tokens(self):
        """Attributes of the coloured tokens."""
        return [a for tag, a in self.elements if tag == "span" and "data-h" in a]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "'&amp;",
    "\x00\x1b[31m",
    "\u202eabc",
    "\u200b\u2066",
    "\ud800",
    "\n",
    "א",
    "]]>-->",
    "x" * 100_000,
]


@pytest.fixture
def source():
    """A page of a model with a hostile name, a hostile prompt and a hostile response."""
    reading = Reading(
        problem=0,
        prompt="".join(HOSTILE),
        ids=list(range(12)),
        pieces=HOSTILE,
        kinds=["causal"] + ["other"] * 11,
        sentences=[Span(0, 2, "verify")],
        entropy=np.linspace(0, 2, 12),
        likeliest=[[(text, 0.5), ("b", 0.3), ("c", 0.2)] for text in HOSTILE],
        difficulty=1.0,
    )
    return page([{"</h3><script>": reading}], TEXT)


def test_hostile_text_makes_no_element_and_no_attribute(source):
    parsed = Parsed(source)
    tags = "html head meta title style body h1 h2 h3 p div span"
    assert {tag for tag, _ in parsed.elements} == set(tags.split())
    names = "lang charset http-equiv content class style data-h dir"
    found = {name for _, attributes in parsed.elements for name in attributes}
    assert found == set(names.split())
    assert "url(" not in source and "http:" not in source and "https:" not in source


def test_what_cannot_be_seen_is_shown_and_nothing_is_endless(source):
    source.encode("utf-8")  # no lone surrogates
    assert not set(source) & {"\x00", "\x1b", "\u202e", "\u200b", "\u2066"}
    assert len(source) < 30_000
    text = Parsed(source).text
    for shown in (
        "</script><script>alert(1)</script>",
        "⟨U+0000⟩⟨U+001B⟩[31m",
        "⟨U+202E⟩abc",
        "⟨U+D800⟩",
        "⏎\n",
        "⟨99,800 more characters⟩",
    ):
        assert shown in text


def test_tokens_are_marked_coloured_and_explained(source):
    tokens = Parsed(source).tokens()
    assert len(tokens) == 12
    assert [token["class"] for token in tokens[:3]] == ["t p r", "t r", "t"]
    assert tokens[0]["data-h"].split("\n") == [
        "0.000 nats, token 1",
        "causal; sentence: verify",
        " 50.00%  </script><script>alert(1)</script>",
        " 30.00%  b",
        " 20.00%  c",
    ]
    assert tokens[0]["style"].endswith(",0.00)")
    assert tokens[11]["style"].endswith(",1.00)")


def test_a_page_of_an_endless_response_is_not_endless():
    count = 100_000
    reading = Reading(
        problem=0,
        prompt="p",
        ids=[0] * count,
        pieces=["x"] * count,
        kinds=["other"] * count,
        sentences=[],
        entropy=np.ones(count),
        likeliest=[[]] * count,
        difficulty=1.0,
    )
    parsed = Parsed(page([{"a": reading, "b": reading}], TEXT))
    assert len(parsed.tokens()) == 20_000
    assert parsed.text.count("⟨10,000 of 100,000 tokens⟩") == 2
