"""What a real model answers to real benchmark questions, and how its answers end.

    python -m lab.real_model smollm2 gsm8k_test.jsonl math500.jsonl --counts lab/results/smollm2.json.gz
    python -m lab.real_model --table lab/results/smollm2.json.gz     # the table again, without a model

Pass@K as in evaluate.py, with the paper's temperature and top-p. An answer is right only if it ended
by itself and its last \\boxed{} holds the known answer (template chat). A small model may well solve a
question and not box its answer: the columns beside Pass@K tell how many answers could be graded at
all.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluate import count_solved, pass_table
from lab.saved import read_packed, save_packed
from lab.tables import over_problems, table
from model import load
from plumbing.memory import out_of_memory
from plumbing.settings import check_numbers, flag, parse_flags, pick_device
from rollout import Episode, Sampler
from tasks import Problem, load_task
from tasks.math_grader import final_answer

KS = (1, 2, 4, 8, 16)
TEMPLATE = "chat"


@dataclass
class Settings:
    model_and_data: tuple = flag(
        (), "a model, then files of questions and answers", nargs="*", type=str
    )
    problems: int = flag(100, "of each file, the first in the order of a hash of their text")
    samples: int = flag(16, "answers to each")
    temperature: float = flag(0.6, "the paper's")
    top_p: float = flag(0.95, "the paper's")
    max_new_tokens: int = flag(512, "longest answer, in tokens")
    slots: int = flag(256, "sequences decoded at a time")
    seed: int = flag(0, "of the sampling", least=0)
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16"))
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    counts: str = flag("", "where the counts go (json.gz)")
    table: str = flag("", "print the table of these counts, and sample nothing")


def check(s: Settings) -> None:
    """ValueError or OSError, before anything is sampled."""
    check_numbers(s)
    if len(s.model_and_data) < 2:
        raise ValueError("name a model and at least one file of questions and answers")
    if s.counts and not Path(s.counts).absolute().parent.is_dir():
        raise FileNotFoundError(f"--counts {s.counts} names a folder that does not exist")


def answer_all(s: Settings) -> dict:
    """Samples and grades -> the settings, and for each file what `count_file` says."""
    check(s)
    name, *files = s.model_and_data
    tasks = {
        Path(file).stem: load_task("math", test_data=file, template=TEMPLATE) for file in files
    }
    device = pick_device(s.device)
    model, tokenizer = load(name, device, getattr(torch, s.dtype))
    record = {
        "model": Path(name).name,
        "problems": s.problems,
        "samples": s.samples,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "max_new_tokens": s.max_new_tokens,
        "seed": s.seed,
        "dtype": s.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "files": {},
    }
    for stem, task in tasks.items():
        record["files"][stem] = count_file(stem, task, model, tokenizer, s)
    return record


def count_file(stem: str, task, model, tokenizer, s: Settings) -> dict:
    """The result of evaluate.count_solved, and the shares of the answers that hold a box at all, that
    end by themselves and hold one, and whose grading was given up."""
    problems = task.test[: s.problems]
    boxed = 0
    boxed_and_finished = 0

    def watch(problem: Problem, response: str, episode: Episode) -> None:
        nonlocal boxed, boxed_and_finished
        has_box = final_answer(response, TEMPLATE) is not None
        boxed += has_box
        boxed_and_finished += has_box and episode.finished

    longest = max(len(task.encode(problem, tokenizer)) for problem in problems)
    sampler = Sampler(model, s.slots, longest + s.max_new_tokens, model.eos_ids)
    timeouts_before = task.timeouts
    result = count_solved(
        sampler,
        tokenizer,
        task,
        problems,
        samples=s.samples,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=s.seed,
        progress=stem,
        watch=watch,
    )
    answers = len(problems) * s.samples
    return result | {
        "boxed": boxed / answers,
        "boxed_and_finished": boxed_and_finished / answers,
        "timeouts": task.timeouts - timeouts_before,
    }


def table_of(record: dict) -> str:
    """Markdown: a row a file."""
    ks = [k for k in KS if k <= record["samples"]]
    rows = []
    for stem, result in record["files"].items():
        solved = pass_table(result["solved"], result["samples"], ks)  # [problems, K]
        rows.append(
            [
                f"{stem}, {len(solved)} problems",
                *over_problems(solved[np.newaxis]),
                f"{result['finished']:.3f}",
                f"{result['boxed']:.3f}",
                f"{result['boxed_and_finished']:.3f}",
                str(result["timeouts"]),
                f"{result['tokens']:.0f}",
            ]
        )
    head = [
        f"{record['model']}, {record['samples']} answers each",
        *[f"Pass@{k}" for k in ks],
        "finished",
        "boxed",
        "both",
        "timeouts",
        "tokens",
    ]
    return table(head, rows)


def main(s: Settings) -> None:
    if s.table:
        print(table_of(read_packed(s.table)))
        return
    record = answer_all(s)
    print(table_of(record))
    if s.counts:
        save_packed(record, s.counts)


if __name__ == "__main__":
    try:
        main(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.real_model: {error}")
    except (MemoryError, RuntimeError) as error:
        may_help = "what may help: fewer --slots, less --max-new-tokens, --dtype bfloat16"
        sys.exit(f"lab.real_model: {out_of_memory(error, may_help)}")
