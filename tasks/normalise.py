r"""One way to write an answer: the characters, fonts, wrappers and spellings that change nothing in
what it says. Each row of NORMALISATIONS has its example, which a test holds it to.

Nothing here drops a word or a sign that could change a value. What is left over, and understood by
nobody further on, makes an answer wrong.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Callable, NamedTuple

# ------------------------------------------------------------------------------ characters

CHARACTERS = {
    "×": r"\times ",
    "÷": "/",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "…": r"\ldots ",
    "⁄": "/",
    "∶": ":",
    "。": ".",
    "、": ",",
    "∠": r"\angle ",
    "∴": r"\therefore ",
    "∎": r"\blacksquare ",
}
CHARACTERS |= dict.fromkeys("·⋅∙", r"\cdot ")
CHARACTERS |= dict.fromkeys("°º˚", r"^\circ ")
CHARACTERS |= dict.fromkeys("−–—‐‑‒―﹣－", "-")
CHARACTERS |= dict.fromkeys('“”„‘’«»`"✓✔✅', " ")
CHARACTERS |= dict.fromkeys("$£€¥₹₩₽¢￥＄", " ")  # currency, and the delimiter of formulas
TRANSLATION = str.maketrans(CHARACTERS)

SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")


def compatible(text: str) -> str:
    """Full-width, raised and other forms of a character as the character."""
    return unicodedata.normalize("NFKC", text)


def plain_character(character: str) -> str:
    r"""½ becomes \frac{1}{2} and π \pi; spaces of any width a space, invisible characters none."""
    kind = unicodedata.category(character)
    if kind == "Zs":
        return " "
    if kind == "Cf":
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("VULGAR FRACTION"):
        top, _, bottom = compatible(character).partition("⁄")
        return rf" \frac{{{top}}}{{{bottom}}}"
    if re.fullmatch("GREEK SMALL LETTER [A-Z]+", name):
        return "\\" + name.split()[-1].lower().replace("lamda", "lambda") + " "
    return compatible(character)


def plain_characters(text: str) -> str:
    """The text in ASCII, as far as it has a counterpart there."""
    text = SUPERSCRIPTS.sub(lambda run: "^{" + compatible(run[0]) + "}", text)
    text = SUBSCRIPTS.sub(lambda run: "_{" + compatible(run[0]) + "}", text)
    text = text.translate(TRANSLATION)
    if not text.isascii():
        text = "".join(plain_character(character) for character in text)
    return text.replace("\N{MINUS SIGN}", "-")  # NFKC makes one of a raised minus


# ------------------------------------------------------------------------------ the table


class Row(NamedTuple):
    """What is replaced, by what; an example before and after."""

    pattern: str
    replacement: str | Callable[[re.Match], str]
    before: str
    after: str


def without_separators(match: re.Match) -> str:
    return re.sub("[ ,]", "", match[0])


def mixed_number(match: re.Match) -> str:
    """1 3/4 is a number, 4 10/3 is nothing that a reader knows."""
    whole, top, bottom = match.groups()
    is_proper = int(top) < int(bottom)
    return rf"{whole}\frac{{{top}}}{{{bottom}}}" if is_proper else match[0]


def repeating_decimal(match: re.Match) -> str:
    whole, fixed, digits, digit = match.groups()
    repeated = digits or digit
    shift = 10 ** len(fixed)
    nines = 10 ** len(repeated) - 1
    value = Fraction(int(whole + fixed), shift) + Fraction(int(repeated), nines * shift)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


END = r"(?![a-zA-Z])"  # of a command's name
UNESCAPED = r"(?<!\\)"
FONT = (
    r"\\(?:text\w*|math(?:rm|bf|sf|tt|it|cal|normal)|operatorname\*?|emph|[mhf]box|boxed|boldsymbol"
    r"|bm|pmb|underline|ensuremath)\s*"
)
SIZE = r"\\(?:(?:display|text|script)style|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|rm|it|sf|tt)"
GROUP = r"(\{(?:[^{}]|\{[^{}]*\})*\})"
SYMBOL = r"(\\pi|[0-9a-zA-Z])"
NUMBER = r"\d+(?:\.\d+)?"
TRIGONOMETRY = r"\\(?:sin|cos|tan|cot|sec|csc)" + END

# Every pattern takes time linear in the text, or meets no more than LONGEST characters.
NORMALISATIONS = (
    # What stands around an answer.
    Row(r"<\|[^|<>]*\|>|</?[a-z]\w*>", " ", "7<|im_end|>", "7 "),
    Row(r"^([*_]+)([^*_]*)\1$", r"\2", "_7_", "7"),
    Row(r"^(?:\s|#|\*\*|\*(?=\s))+", "", "** 7", "7"),
    Row(r"(?:\s|\*\*)+$", "", "7** ", "7"),
    Row("^'([^']*)'$", r"\1", "'7'", "7"),
    Row(r"\s*\\blacksquare$", "", r"7 \blacksquare", "7"),
    Row(r"(?<=[^\s.,;?!\\])\s*[.,;?]$", "", "7.", "7"),
    Row(
        r"(?i)^(?:(?:so|thus|hence|therefore|the|my|our|final|correct)[, ]+){0,4}"
        r"(?:answer|option|choice)\s*(?:is\b|:|=)[\s:=]*",
        "",
        "The final answer is: 7",
        "7",
    ),
    Row(
        r"^(?:\\therefore" + END + r"|(?i:so|thus|hence|therefore)\b,?)", "", "So, x = 7", " x = 7"
    ),
    Row(r"^\[([^\[\](),]*)\]$", r"\1", "[7]", "7"),
    Row(
        r"\(?(?i:(?<!\\)\b(?:approximately|approx)\b)\)?",
        r"\\approx ",
        "7 (approximately)",
        r"7 \approx ",
    ),
    Row(r"^\s*(?:=|\\approx" + END + r")|\\approx\s*$", "", r"\approx 7", " 7"),
    Row(r"^(-? *)(?:USD?|EUR|GBP|Rs\.?) *(?=[\d.-])", r"\1", "USD 500", "500"),
    # Spaces, delimiters and sizes of LaTeX.
    Row(UNESCAPED + r"\\\\(?=(?:d?frac|sqrt|pi|text)" + END + ")", r"\\", r"\\frac12", r"\frac12"),
    Row(UNESCAPED + r"\\!\s*", "", r"10,\!080", "10,080"),
    Row(UNESCAPED + r"\\(?:[,;:> ]|$)|(?<!~)~(?!~)", " ", r"12\,345", "12 345"),
    Row(r"\\(?:thin|med|thick|en)space" + END, " ", r"1\thinspace 000", "1  000"),
    Row(UNESCAPED + r"\\[()\[\]$]", " ", r"\(7\)", " 7 "),
    Row(r"\\hspace\s*\{[^{}]*\}", " ", r"7\hspace{1mm}", "7 "),
    Row(r"\\(?:left|right)\.", "", r"\left.7\right.", "7"),
    Row(r"\\(?:left|right|[bB]igg?[lrm]?)" + END, "", r"\left[1,2\right)", "[1,2)"),
    Row(SIZE + END, " ", r"\bf 7", "  7"),
    Row(r"^(?:\s|\\\\|\\q?quad" + END + ")+", "", r"\quad 7", "7"),
    Row(r"(?:\s|\\\\|\\q?quad)+$", "", r"7\\", "7"),
    Row(r"\\q?quad" + END, ", ", r"3 \quad 5", "3 ,  5"),
    # Fonts.
    Row(r"(?:\\text\s*)?\{,\}", ",", "10{,}000", "10,000"),
    Row(r"\\(?:text)?color\s*\{[^{}]*\}", "", r"\color{red}{7}", "{7}"),
    Row(FONT + r"\{([^{}]*)\}", r" \1 ", r"5\text{cm}", "5 cm "),
    Row(r"\\boxed(?![a-zA-Z]|\s*\{)", " ", r"\boxed 7", "  7"),
    Row(FONT + r"(?=\{)", "", r"\mathbf{\frac{1}{2}}", r"{\frac{1}{2}}"),
    Row(r"\s+(?=[_^])", "", "1A _{16}", "1A_{16}"),
    Row(r"\^\s+", "^", "2^ 3", "2^3"),
    # Other words for the same.
    Row(r"\\[dtc]frac" + END, r"\\frac", r"\dfrac{1}{2}", r"\frac{1}{2}"),
    Row(r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}", r"{1 \over 2}", r"\frac{1 }{ 2}"),
    Row(r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}", r"{5\choose 2}", r"\binom{5}{ 2}"),
    Row(r"^\{((?:[^{}]|" + GROUP + r")*)\}$", r"\1", "{1, 2}", "1, 2"),
    Row(r"<=|\\leqslant" + END, r"\\le ", "x<=3", r"x\le 3"),
    Row(r">=|\\geqslant" + END, r"\\ge ", "x>=3", r"x\ge 3"),
    Row(r"!=|\\ne" + END, r"\\neq ", r"x\ne 3", r"x\neq  3"),
    Row(r"\\colon" + END, ":", r"3\colon 2", "3: 2"),
    Row(r"\\lbrace" + END, r"\\{", r"\lbrace 1", r"\{ 1"),
    Row(r"\\rbrace" + END, r"\\}", r"1 \rbrace", r"1 \}"),
    Row(r"\\varnothing" + END + r"|\\\{\s*\\\}", r"\\emptyset", r"\{\}", r"\emptyset"),
    Row(
        r"\\mathbb\s*\{?R\}?|(?i:\ball reals?(?: numbers?)?)\b",
        r"(-\\infty,\\infty)",
        "all real numbers",
        r"(-\infty,\infty)",
    ),
    Row(r"(?<![a-zA-Z\\])inf(?:inity)?" + END, r"\\infty ", "-infinity", r"-\infty "),
    Row(r"(?<![a-zA-Z\\])(sqrt|pi|theta|sin|cos|tan|log|ln|exp)" + END, r"\\\1 ", "2pi", r"2\pi "),
    Row(r"\\langle" + END + r"([^()]*)\\rangle", r"(\1)", r"\langle 1,2\rangle", "( 1,2)"),
    Row(
        r"\\begin\{[pb]matrix\}([^&]*)\\end\{[pb]matrix\}",
        lambda match: "(" + match[1].replace(r"\\", ",") + ")",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        "(1,2)",
    ),
    Row(r"^\\\{\s*[a-z]\s*(?::|\||\\mid)\s*(.*)\\\}$", r"\1", r"\{x : x > 2\}", "x > 2"),
    Row(r"^\](?=.*,)", "(", "]2,5]", "(2,5]"),
    Row(r"(,[^\[\]()]*)\[$", r"\1)", "[2,5[", "[2,5)"),
    # Arguments in parentheses, or with nothing around them.
    Row(r"\\frac\s*\(([^()]*)\)\s*\(([^()]*)\)", r"\\frac{\1}{\2}", r"\frac(1)(2)", r"\frac{1}{2}"),
    Row(r"∛\s*(\d+|[a-z])", r"\\sqrt[3]{\1}", "∛12", r"\sqrt[3]{12}"),
    Row(r"√\s*(\d+|[a-z])", r"\\sqrt{\1}", "√12", r"\sqrt{12}"),
    Row("√", r"\\sqrt ", "√(2)", r"\sqrt (2)"),
    Row(
        r"(\\sqrt(?:\[\d+\])?|\^)\s*\(([^()]*)\)",
        r"\1{\2}",
        r"3\sqrt(5)+2^(3)",
        r"3\sqrt{5}+2^{3}",
    ),
    Row(r"\\sqrt\s*" + SYMBOL + r"(?!\d)", r"\\sqrt{\1}", r"\sqrt2", r"\sqrt{2}"),
    Row(r"\\frac\s*" + SYMBOL + r"\s*" + SYMBOL, r"\\frac{\1}{\2}", r"\frac12", r"\frac{1}{2}"),
    Row(r"\\frac\s*" + SYMBOL + r"\s*(?=\{)", r"\\frac{\1}", r"\frac1{2}", r"\frac{1}{2}"),
    Row(r"\\frac\s*" + GROUP + r"\s*" + SYMBOL, r"\\frac\1{\2}", r"\frac{1}2", r"\frac{1}{2}"),
    # Numbers.
    Row(
        r"^(?!.*(?:[(\[]|\\\{)).*$",
        lambda match: re.sub(
            r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)", without_separators, match[0]
        ),
        r"1,000\pi",
        r"1000\pi",
    ),
    Row(
        r"(?<![\d.,/^_])[1-9]\d{0,2}(?: +\d{3})+(?! *\d)", without_separators, "12 345.5", "12345.5"
    ),
    Row(r"(?<![\d.,/])(\d+) +(\d+) */ *(\d+)(?![\d.])", mixed_number, "1 3/4", r"1\frac{3}{4}"),
    Row(
        r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))(?!\d)",
        repeating_decimal,
        r"0.\overline{36}",
        r"\frac{4}{11}",
    ),
    Row(r"_\s*(\d+)", r"_{\1}", r"\log_2 8", r"\log_{2} 8"),
    Row(r"\*\*", "^", "2**10", "2^10"),
    Row(r"\^\s*(-?\d+)", r"^{\1}", "2^10", "2^{10}"),
    Row(r"(?<=\d)\s*[xX]\s*(?=10\^)", r"\\times ", "3 x 10^4", r"3\times 10^4"),
    Row(r"(?<=\d)E([+-]?\d+)$", r"\\cdot 10^{\1}", "3E8", r"3\cdot 10^{8}"),
    Row(r"\s*(?:\\?%|\bper ?cent\b)(?=\s*(?:$|,))", "", r"25\%", "25"),
    # A degree is a unit, but not inside a sine.
    Row(r"\^\s*\{?\s*(?:\\circ|\\degree|o)\s*\}?" + END, r"^\\circ ", r"45^{\circ}", r"45^\circ "),
    Row(
        "(" + TRIGONOMETRY + r"[^\^]*?)(" + NUMBER + r")\^\\circ",
        r"\1(\\frac{\2\\pi}{180})",
        r"\cos 60^\circ",
        r"\cos (\frac{60\pi}{180})",
    ),
    Row(r"\^\\circ\s*[CF]?" + END + r"(?!\s*[\d^])", "", r"45^\circ C", "45"),
)
LAYERS = 4  # as in **\text{(C)}.**


def normalise(text: str) -> str:
    """The text as the table has it."""
    text = plain_characters(text)
    for _ in range(LAYERS):
        before = text
        for row in NORMALISATIONS:
            text = re.sub(row.pattern, row.replacement, text)
        text = " ".join(text.split())
        if text == before:
            break
    return text
