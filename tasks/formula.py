r"""From an answer, as normalise.py writes it, to a formula that math-verify's parser reads as a
reader does. None for what it would skip, or take for something else.
"""

import re

from tasks.answer_kinds import has_words
from tasks.normalise import GROUP

RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq|[lg]t)(?![a-zA-Z])")
NOT_UNDERSTOOD = re.compile(
    r"\d\.?\s+[\d.]"  # 3 5, which would be 8
    r"|\d\s+[+-]\d"  # 3 -5
    r"|[+-]-"  # +- and -- are two signs to some, one to others
    r"|\d\s*\{"  # 3{5}
    r"|\.\d*\."  # 1.2.3, 7...
    r"|\\\\(?!.*matrix)"  # two lines
    r"|:.*:"  # a quotient of quotients
    r"|/\s*\d+\s*(?:[a-zA-Z(]|\\(?:pi|sqrt|frac))"  # 1/2x is x/2 to some, 1/(2x) to others
    r"|[\d)\]](?:\^\{[^{}]*\})?\s*_|\\pi\s*_"  # an index is a base to some, a name to others
    r"|\d\s*\\frac\{\d+\}\{\d+\}\s*(?:[/\d]|\\frac)"  # 2\frac{3}{4}\frac{1}{2}
    r"|\\\{(?:(?!\\\}).)*\\\{"  # a set in a set
    r"|[fgh]\s*\^\{-1\}\s*\("  # an inverse function, or a quotient
    r"|['%]|!!|\\(?:circ|p?mod|mid|[lc]?dots|phantom)"
)
MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
DECIMAL = re.compile(r"(\d*)\.(\d+)")
# Two numbers side by side are a product, which the parser would take for a mixed number.
BETWEEN_FACTORS = re.compile(
    rf"(\\(?:frac|binom){GROUP}{GROUP}|\)|(?<![\d.])\d+)\s*(?=\(|\\frac|\\binom|(?<=\D)\d)"
)


def formula(text: str) -> str | None:
    """The formula, or None if the text is more or less than one."""
    if RELATION.search(text):
        text = re.sub(r",?\s*\bor\b", r" \\lor ", text)
        text = re.sub(r",?\s*\band\b", r" \\land ", text)
    else:
        text = re.sub(r",?\s*\b(?:and|or)\b", ",", text)
    if has_words(text) or NOT_UNDERSTOOD.search(text):
        return None
    if text.count(r"\pm") == 1 and re.search(r"\\frac\s*\{[^{}]*\\pm", text):
        text = text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-")
    text = DECIMAL.sub(fraction_of_decimal, text)
    text = MIXED.sub(sum_of_mixed, text)
    return BETWEEN_FACTORS.sub(r"\1\\cdot ", text)


def fraction_of_decimal(match: re.Match) -> str:
    r"""0.25 -> (\frac{25}{100}), because the parser would make a float of it."""
    whole, decimals = match.groups()
    return rf"(\frac{{{whole}{decimals}}}{{1{'0' * len(decimals)}}})"


def sum_of_mixed(match: re.Match) -> str:
    r"""1\frac{3}{4} -> (1+\frac{3}{4}); 1\frac{4}{3} stays, and is a product."""
    whole, top, bottom = match.groups()
    if int(top) >= int(bottom):
        return match[0]
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})"
