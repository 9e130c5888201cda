"""What lab/analyze.py shows: its tables, its picture (the paper's Figure 2) and its page of responses (Figure 1).

The page is one HTML file without scripts, fonts or addresses, so it works offline, and no text in it can do anything:
every text is escaped, and a policy in its head forbids scripts and loading should an escape be missing. Characters that
cannot be seen or that turn the order of their neighbours (control, format, unassigned) are written as ⟨U+202E⟩, and of
very long tokens (and responses) only the beginning is shown, with the number of characters (tokens) left out.
"""

from __future__ import annotations

import html
import math
import unicodedata
from pathlib import Path
from typing import Sequence

from lab.exploration import Reading

LONGEST, MOST = 200, 10_000                 # characters shown of a token, tokens of a response: browsers have limits
NEWLINE = "⏎\n"                             # a line's end, seen and done
STYLE = """body { font: 15px/1.9 system-ui, sans-serif; margin: 1.5em; color: #111; background: #fff }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(18em, 1fr); gap: 1.5em; overflow-x: auto }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere } .text { padding-bottom: 5em }
.t { position: relative; unicode-bidi: isolate } .e { padding: 0 .6em }
.p { font-weight: bold; border-bottom: 3px solid #06c } .r { border-top: 2px dashed #080 }
.t:hover { outline: 1px solid #111 }
.t:hover::after { content: attr(data-h); position: absolute; left: 0; top: 1.7em; z-index: 1; width: max-content;
  max-width: 24em; padding: .3em .6em; font: 13px/1.4 monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  color: #fff; background: #222 }"""


def visible(text: str, newline: str = "⏎", longest: int = LONGEST) -> str:
    """`text` with every character in it to be seen, and not endless. To be escaped where it goes into HTML."""
    shown = [newline if c == "\n" else c if unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
             else f"⟨U+{ord(c):04X}⟩" for c in text[:longest]]
    return "".join(shown) + (f"⟨{len(text) - longest:,} more characters⟩" if len(text) > longest else "")


def token_spans(r: Reading, kinds: tuple[dict, dict], darkest: float) -> str:
    """The tokens of a response, each in its colour, with its marks and what is shown when the pointer is on it."""
    sentence = {i: kind for first, end, kind in r.sentences for i in range(first, end)}
    spans = []
    for i, (piece, kind, entropy) in enumerate(zip(r.pieces[:MOST], r.kinds, r.entropy)):
        lines = [f"{entropy:.3f} nats, token {i + 1}", f"{kind}; sentence: {sentence.get(i, 'none')}"]
        likeliest = r.alternatives[i] if r.alternatives else []
        lines += [f"{p:7.2%}  {visible(text, longest=40)}" for text, p in likeliest]
        marks = "t" + " p" * (kinds[0].get(kind) is True) + " r" * (kinds[1].get(sentence.get(i)) is True)
        tip = html.escape("\n".join(lines)).replace("\n", "&#10;")
        spans.append(f'<span class="{marks}" style="background:rgba(235,80,0,{min(1.0, entropy / darkest):.2f})" '
                     f'data-h="{tip}">{html.escape(visible(piece, NEWLINE))}</span>')
    return "".join(spans) + (f"⟨{len(r.pieces) - MOST:,} more tokens⟩" if len(r.pieces) > MOST else "")


def page(cases: Sequence[dict[str, Reading]], kinds: tuple[dict, dict]) -> str:
    """One HTML page: for each problem the answers of all models side by side."""
    everything = sorted(h for case in cases for r in case.values() for h in r.entropy)
    darkest = max(everything[int(0.99 * (len(everything) - 1))], 1e-6) if everything else 1.0
    legend = "".join(f'<span class="t e" style="background:rgba(235,80,0,{x:.2f})">{x * darkest:.2f}</span>'
                     for x in (0, 0.25, 0.5, 0.75, 1))
    body = [f'<h1>Entropy of every token</h1><p>{legend} nats (the darkest stands for all above). '
            '<span class="t p">pivotal token</span>, <span class="t r">reflective sentence</span>. Point at a token for its '
            'entropy and the three likeliest tokens in its place.</p>']
    for number, case in enumerate(cases, 1):
        prompt = next(iter(case.values())).prompt
        body.append(f'<h2>Problem {number}</h2><p class="prompt">{html.escape(visible(prompt, NEWLINE, 10_000))}</p>'
                    '<div class="row">')
        body += [f'<div><h3>{html.escape(visible(name))}</h3><div class="text" dir="ltr">'
                 f'{token_spans(r, kinds, darkest)}</div></div>' for name, r in case.items()]
        body.append("</div>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><title>Entropy of every token</title><style>{STYLE}</style></head>\n<body>\n'
            + "\n".join(body) + "\n</body></html>\n")


def cell(figure: dict | None, sign: str = "") -> str:
    """A figure with its interval, as text."""
    if not figure or not math.isfinite(figure["mean"]):
        return "-"
    return f"{figure['mean']:{sign}.3f} [{figure['interval'][0]:{sign}.3f}, {figure['interval'][1]:{sign}.3f}]"


def tables(report: dict) -> str:
    """The report as text: runs side by side, then every comparison, then the first problem's answers."""
    models, lines = report["models"], []
    first = next(iter(models.values()))
    lines += ["", f"{'':32}" + "".join(f"{name[-26:]:>28}" for name in models)]
    lines += [f"{row:32}" + "".join(f"{cell(m['behaviour'][row]):>28}" for m in models.values())
              for row in first["behaviour"]]
    columns = ("mean", "others", "difference", "d")

    def line(name: str, c: dict | None) -> str:
        if c is None:
            return f"{name[:34]:34}{'too few of one kind':>26}"
        cells = "".join(f"{cell(c[x], '+' if x in columns[2:] else ''):>26}" for x in columns)
        return f"{name[:34]:34}{cells}{c['p']:>9.2g}{c['n']:>9}{c['n others']:>9}"

    for name, model in models.items():
        for subject, record in ((key, value) for key, value in model.items() if key != "behaviour"):
            head = "".join(f"{x:>26}" for x in columns) + f"{'p':>9}{'n':>9}{'n others':>9}"
            lines += ["", f"{name}: {subject}", " " * 34 + head, line("all", record["all"])]
            for stratum, bins in record["within"].items():
                lines += [line(f"  {stratum} {label}", c) for label, c in bins.items()]
            lines += [f"{'  kind ' + kind:34}{cell(f):>26}{'':87}{int(f['n']):>9}" for kind, f in record["kinds"].items()]
    for case in report["cases"][:1]:
        lines += ["", *(f"{name}: {visible(text, ' ', 600)}" for name, text in case.items())]
    return "\n".join(lines)


def draw(report: dict, file: Path) -> str:
    """Draws the bars to `file`; returns what to say of it."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: it needs matplotlib: pip install matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    subjects = list(dict.fromkeys(key for m in report["models"].values() for key in m if m[key].get("all")))
    figure, axes = plt.subplots(1, max(1, len(subjects)), figsize=(1 + 4 * len(subjects), 4), layout="constrained",
                                squeeze=False)
    for axis, subject in zip(axes.flat, subjects):
        shown = {name: m[subject]["all"] for name, m in report["models"].items() if m.get(subject, {}).get("all")}
        for shift, key, label, style in ((-0.2, "mean", subject, dict(color="0.55")),
                                         (0.2, "others", "others", dict(color="0.85", hatch="//", edgecolor="0.5"))):
            means, lows, highs = zip(*((c[key]["mean"], *c[key]["interval"]) for c in shown.values()))
            x = [i + shift for i in range(len(shown))]
            axis.bar(x, means, width=0.38, label=label, **style)
            axis.vlines(x, lows, highs, color="0.0", linewidth=1.5)
            axis.plot([x, x], [lows, highs], "_", color="0.0", markersize=9)
        axis.set_xticks(range(len(shown)), [("…" * (len(name) > 14) + name[-14:]).replace("$", r"\$") for name in shown],
                        fontsize=8)
        axis.set(ylabel="mean entropy, nats", title=subject)
        axis.margins(y=0.25)
        axis.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return f"written: {file}"
