"""lab/english.py: what is saved of reports, its tables and picture against a report made up by hand;
and the rows of the saved reports in lab/SMOLLM2.md, made here again apart from it."""

import gzip
import json
from pathlib import Path

import pytest

from lab.english import condense, draw, draw_differences, markdown, read, save
from lab.entropy_report import draw_comparison, draw_controls

SAVED = Path("lab/results/english.json.gz")
CONTROLS = [
    "other tokens",
    "other words",
    "as frequent",
    "at the same place",
    "as frequent, at the same place",
    "at the same place, in the same answer",
]


def figure(mean):
    return {"mean": mean, "interval": [mean - 0.25, mean + 0.5]}


def comparison(mean, others):
    return {
        "mean": figure(mean),
        "others": figure(others),
        "difference": figure(mean - others),
        "n": 1200,
        "n others": 34,
        "left out": 0,
    }


@pytest.fixture
def report():
    """Of one model, with two categories, of which one is rare, and no reflection."""
    matched = {}
    for i, control in enumerate([*CONTROLS, "openers"]):
        found = comparison(3.0, 1.0 + i / 4)
        matched[control] = {"all": found, "causal": found, "contrastive": None}
    return {
        "settings": {"temperature": 0.6, "top_p": 0.95},
        "behaviour": {
            "m": {"tokens per response": figure(200.0), "of nothing": figure_of_nothing()}
        },
        "comparisons": {
            "pivotal tokens": {"m": {"all": None, "position 0 to 9": comparison(2, 1)}}
        },
        "controls": {
            "pivotal tokens": {"m": matched},
            "reflective actions": {"m": {"other sentences": {"all": None}}},
        },
        "words": {"m": {"so": comparison(3, 2), "yet": None}},
        "counts": {"m": {"tokens": {"causal": 1200, "contrastive": 7}, "sentences": {"verify": 3}}},
        "answers": [{"m": "a long text"}],
    }


def figure_of_nothing():
    return {"mean": None, "interval": [None, None]}


def test_tables_are_those_by_hand(report):
    rows = markdown({"T = 0.6": report}).splitlines()
    minus = " | ".join(
        f"{2 - i / 4:+.2f} [{1.75 - i / 4:+.2f}, {2.5 - i / 4:+.2f}]" for i in range(6)
    )
    assert f"| all | 1,207 | 3.00 [2.75, 3.50] | {minus} |" in rows
    assert "| contrastive | 7 |  | " + " | ".join(["too few"] * 6) + " |" in rows
    of_position = "2.00 [1.75, 2.50] | 1.00 [0.75, 1.50] | +1.00 [+0.75, +1.50]"
    assert f"| position 0 to 9 | 1,200 | 34 | {of_position} |" in rows
    openers = "3.00 [2.75, 3.50] | 2.50 [2.25, 3.00] | +0.50 [+0.25, +1.00]"
    assert f"| pivotal sentence openers, minus the others | 1,200 | 34 | {openers} |" in rows
    assert "| reflective sentences: other sentences | too few |  |  |  |  |" in rows
    of_so = "3.00 [2.75, 3.50] | 2.00 [1.75, 2.50] | +1.00 [+0.75, +1.50]"
    assert f"| *so* | 1,200 | 34 | {of_so} |" in rows
    assert "| *yet* | too few |  |  |  |  |" in rows
    assert "| sentences: verify | 3 |" in rows
    assert "| of nothing |  |" in rows


def test_all_but_the_answers_is_saved(report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    save(condense((str(file),)), tmp_path / "saved.json.gz")
    del report["answers"]
    assert read(tmp_path / "saved.json.gz") == {"T = 0.6, top-p 0.95": report}

    with pytest.raises(ValueError, match="two reports have T = 0.6"):
        condense((str(file), str(file)))
    file.write_text('{"controls": {}}')
    with pytest.raises(ValueError, match="no report of English"):
        condense((str(file),))


@pytest.fixture
def axis():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib.figure import Figure

    return Figure().subplots()


def words_on(axis):
    return [text.get_text().strip() for text in axis.texts]


def test_what_is_too_few_is_said_and_not_drawn(axis, report):
    controls = report["controls"]["pivotal tokens"]["m"]
    draw_controls(axis, controls, "title")
    assert words_on(axis) == ["too few"]  # contrastive words
    heights = sorted(bar.get_height() for bar in axis.patches)
    # All, causal: 3 beside 1, 1.5 and 2; openers: 3 beside 2.5.
    assert heights == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert len(axis.get_legend().get_texts()) == 5


@pytest.mark.parametrize(
    "models,words",
    [
        ({}, "needs a second model"),
        ({"m": {"all": None}}, "too few"),
        ({"m": {"all": comparison(1, 2) | {"n": 9}}}, "too few"),
    ],
)
def test_an_empty_panel_has_no_axis_and_no_squares(axis, models, words):
    draw_comparison(axis, "rare behaviours", models)
    assert words_on(axis) == [words]
    assert not axis.patches and axis.get_legend() is None and not axis.axison


def test_no_pivotal_word_at_all_is_too_few(axis, report):
    controls = report["controls"]["pivotal tokens"]["m"]
    nothing = {control: dict.fromkeys(kinds) for control, kinds in controls.items()}
    draw_controls(axis, nothing, "title")
    assert words_on(axis) == ["too few"] and not axis.patches


def test_points_are_the_differences(axis, report):
    """Of all, causal and (not drawn) contrastive words, beside each control; then of openers."""
    draw_differences(axis, report["controls"]["pivotal tokens"]["m"])
    points = [line for line in axis.lines if len(line.get_xdata()) == 1]
    heights = [float(line.get_ydata()[0]) for line in points]
    wanted = [2 - i / 4 for i in range(6) for _ in ("all", "causal")]
    assert heights == wanted + [2 - 6 / 4]
    places = [round(float(line.get_xdata()[0])) for line in points]
    assert places == [0, 1] * 6 + [3]  # 2 is of contrastive words
    labels = axis.get_legend_handles_labels()[1]
    assert labels == [*CONTROLS, "other openers"]


def test_the_picture_is_drawn_from_what_is_saved(report, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib import image

    draw({"T = 1": report, "T = 0.6": report}, tmp_path / "x.png")
    pixels = image.imread(tmp_path / "x.png")[..., :3]
    assert 0.02 < (pixels.mean(-1) < 0.9).mean() < 0.6  # drawn, not blank


def cells(found, side, number):
    low, high = found[side]["interval"]
    return f"{found[side]['mean']:{number}} [{low:{number}}, {high:{number}}]"


def test_published_rows_are_made_of_what_is_saved():
    """All tables as lab/english.py makes them, and the pivotal words once more by hand."""
    published = Path("lab/SMOLLM2.md").read_text().splitlines()
    reports = json.loads(gzip.decompress(SAVED.read_bytes()))
    for row in markdown(reports).splitlines():
        assert row in published, row

    for report in reports.values():
        [model, *_] = report["controls"]["pivotal tokens"]
        controls = report["controls"]["pivotal tokens"][model]
        counts = report["counts"][model]["tokens"]
        found = [controls[control]["causal"] for control in CONTROLS]
        row = [
            "causal",
            f"{counts['causal']:,}",
            cells(found[1], "mean", ".2f"),
            *(cells(one, "difference", "+.2f") for one in found),
        ]
        assert f"| {' | '.join(row)} |" in published


def test_what_is_saved_holds_no_answers():
    for report in json.loads(gzip.decompress(SAVED.read_bytes())).values():
        assert "answers" not in report
