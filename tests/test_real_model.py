"""lab/real_model.py: the shares of answers with a box counted by hand, Pass@K of its table by hand, and
the table of lab/SMOLLM2.md made again from the saved counts."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import real_model
from lab.real_model import Settings, check, count_file, table_of

COUNTS = Path("lab/results/smollm2.json.gz")
PAGE = Path("lab/SMOLLM2.md")


def test_how_answers_end_is_counted_by_hand(monkeypatch):
    """Of four answers two are boxed, one of them cut at the limit."""
    answers = [("\\boxed{4}", True), ("\\boxed{4} and so on", False), ("4", True), ("It", False)]

    def answer_as_above(*arguments, samples, watch, **others) -> dict:
        for text, finished in answers:
            watch(None, text, SimpleNamespace(finished=finished))
        return {"solved": [1, 0], "samples": samples, "tokens": 3.5, "finished": 0.5}

    monkeypatch.setattr(real_model, "count_solved", answer_as_above)
    monkeypatch.setattr(real_model, "Sampler", lambda *arguments: None)
    task = SimpleNamespace(test=["a", "b"], encode=lambda *arguments: [1], timeouts=0)
    model = SimpleNamespace(eos_ids=(0,))
    result = count_file("two", task, model, None, Settings(samples=2))
    assert (result["boxed"], result["boxed_and_finished"]) == (0.5, 0.25)
    assert (result["timeouts"], result["solved"]) == (0, [1, 0])


def test_the_table_by_hand():
    """One of two answers right: Pass@1 is 1/2, Pass@2 is 1; the other problem has 0."""
    result = {"solved": [1, 0], "samples": 2, "tokens": 7.6, "finished": 0.75}
    result |= {"boxed": 0.5, "boxed_and_finished": 0.25, "timeouts": 3}
    record = {"model": "small", "samples": 2, "files": {"gsm8k": result}}
    head, _, row = table_of(record).splitlines()
    assert head.startswith("| small, 2 answers each | Pass@1 | Pass@2 | finished |")
    assert row == (
        "| gsm8k, 2 problems | 0.250 [0.000, 0.500] | 0.500 [0.000, 1.000] "
        "| 0.750 | 0.500 | 0.250 | 3 | 8 |"
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(("base",)), "name a model and at least one file"),
        (Settings(("base", "a.jsonl"), counts="no/such/a.gz"), "a folder that does not exist"),
        (Settings(("base", "a.jsonl"), samples=0), "--samples must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_sentence(settings, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        check(settings)


def test_the_table_of_the_page_is_made_again_from_the_saved_counts():
    record = json.loads(gzip.decompress(COUNTS.read_bytes()))
    assert table_of(record) in PAGE.read_text()
    for result in record["files"].values():
        assert len(result["solved"]) == record["problems"]
        assert torch.tensor(result["solved"]).max() <= record["samples"]
