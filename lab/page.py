"""The page of lab.analyze: responses side by side, every token in the colour of its entropy (the
paper's Figure 1).

The frame is lab/page.html. Whatever a model wrote is shown as text: escaped, what cannot be seen by
its number, and not endless.
"""

import html
import unicodedata
from pathlib import Path
from typing import Sequence

import numpy as np

from lab.exploration import Kinds
from lab.reading import Reading

LONGEST_RESPONSE = 10_000  # tokens that are shown
LONGEST_PROMPT = 10_000  # characters
LONGEST_TOKEN = 200  # characters, also of a model's name
LONGEST_IN_TIP = 40
# Control, format, unassigned, private, surrogate, line, paragraph: unseen, or they turn text round.
UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def page(cases: Sequence[dict[str, Reading]], kinds: Kinds) -> str:
    """lab/page.html filled in: for each problem the answers of all models side by side."""
    entropies = [0]
    for case in cases:
        for reading in case.values():
            entropies.extend(reading.entropy)
    # Not the largest: one token would pale all others.
    darkest = max(1e-6, np.quantile(entropies, 0.99))

    body = []
    for case in cases:
        prompt = next(iter(case.values())).prompt
        columns = [column(name, reading, kinds, darkest) for name, reading in case.items()]
        body.append(f'<h2 class="prompt">{visible(prompt, LONGEST_PROMPT)}</h2>')
        body.append(f'<div class="row">{"".join(columns)}</div>')

    frame = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return frame.replace("DARKEST", f"{darkest:.2f}").replace("BODY", "".join(body))


def column(name: str, reading: Reading, kinds: Kinds, darkest: float) -> str:
    """One model's answer."""
    sentence_kind = {}  # of each token that is in a sentence
    for span in reading.sentences:
        for i in range(span.first, span.end):
            sentence_kind[i] = span.kind

    tokens = []
    for i in range(min(len(reading.pieces), LONGEST_RESPONSE)):
        tokens.append(token(reading, i, sentence_kind.get(i), kinds, darkest))
    if len(reading.pieces) > LONGEST_RESPONSE:
        tokens.append(f"⟨{LONGEST_RESPONSE:,} of {len(reading.pieces):,} tokens⟩")
    text = "".join(tokens)
    return f'<div><h3>{visible(name)}</h3><div class="text" dir="ltr">{text}</div></div>'


def token(reading: Reading, i: int, sentence_kind: str | None, kinds: Kinds, darkest: float) -> str:
    """A coloured, marked token; pointing at it shows what the model would rather have written."""
    entropy = reading.entropy[i]
    kind = reading.kinds[i]
    tip = [
        f"{entropy:.3f} nats, token {i + 1}",
        f"{kind}; sentence: {sentence_kind or 'none'}",
    ]
    for text, probability in reading.likeliest[i]:
        tip.append(f"{probability:7.2%}  {visible(text, LONGEST_IN_TIP)}")

    marks = "t"
    if kinds.tokens.get(kind):
        marks += " p"
    if kinds.sentences.get(sentence_kind):
        marks += " r"

    opacity = min(1.0, entropy / darkest)
    style = f"background:rgba(235,80,0,{opacity:.2f})"
    tip_text = "&#10;".join(tip)
    shown = visible(reading.pieces[i])
    return f'<span class="{marks}" style="{style}" data-h="{tip_text}">{shown}</span>'


def visible(text: str, longest: int = LONGEST_TOKEN) -> str:
    """`text` as harmless HTML."""
    shown = html.escape("".join(visible_character(character) for character in text[:longest]))
    if len(text) > longest:
        shown += f"⟨{len(text) - longest:,} more characters⟩"
    return shown


def visible_character(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if unicodedata.category(character) in UNSEEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character
