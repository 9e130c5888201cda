"""What the tests of lab.analyze share: sentences checked by hand, a model that can write any text,
and readings made up of words."""

import re

import numpy as np

from lab.exploration import dissect_text
from lab.reading import Reading

WORDS = re.compile(r"\s*\S+|\s+")  # a stand-in for a tokenizer: words with the space before them

C = "causal"
N = "contrastive"
Q = "sequential"
V = "reasoning verbs"

# A sentence, the categories of its pivotal tokens in order, and its kind of reflection.
SENTENCES = [
    ("Because $x$ is even, $x^2$ is even.", [C], "other"),
    ("Therefore, the area is $12$ square units.", [C], "other"),
    ("Thus $n = 7$, and hence $n + 1 = 8$.", [C, C], "other"),
    (
        "Since the angles add up to $180^\\circ$, the third angle is $40^\\circ$.",
        [C],
        "other",
    ),
    ("As a result, every row sums to $10$.", [C], "other"),
    ("The sum is large due to the last term, so we bound it.", [C, C], "other"),
    ("However, $k$ cannot be negative.", [N], "other"),
    ("Although the first factor is prime, the other is not.", [N], "other"),
    ("This works for $n = 2$ but not for $n = 3$.", [N], "other"),
    ("On the other hand, the left side is divisible by $5$.", [N], "other"),
    ("Unless $a = b$, the line is not vertical.", [N], "other"),
    ("First, we expand the product.", [Q], "other"),
    ("Next we collect terms and then divide by $2$.", [Q, Q], "other"),
    ("Finally, add the three cases.", [Q], "other"),
    ("Recall that the diagonals of a rhombus are perpendicular.", [V], "other"),
    ("Suppose that $p$ divides $q$, which implies $p \\le q$.", [V, V], "other"),
    ("The pattern suggests a formula; we prove it by induction.", [V, V], "other"),
    ("Consider the triangle $ABC$ and note that $AB = AC$.", [V, V], "other"),
    ("The answer is $\\boxed{42}$.", [], "other"),
    ("We have $3x + 5 = 20$.", [], "other"),
    # A command; a longer word.
    ("$a = b \\implies c = d$, the so-called switch.", [], "other"),
    # Parts of words.
    ("She sells 3 paychecks' worth of thousands of butter.", [], "other"),
    ("They wait 20 minutes for the bus.", [], "other"),
    ("Let's check this with $x = 4$.", [], "verify"),
    ("We verify that both roots satisfy the equation.", [], "verify"),
    ("Substituting $x = 2$ back into the equation gives $0 = 0$.", [], "verify"),
    ("Wait, I made a mistake in the second step.", [], "correct"),
    ("Hmm, that is wrong, because $7$ is odd.", [C], "correct"),
    ("Alternatively, use the law of cosines.", [], "start again"),
    ("That leads nowhere, so let me try again with $y$.", [C], "start again"),
    # What a small model writes on word problems: words that count or name are not pivotal.
    ("First, find the cost of the first day.", [Q], "other"),
    ("Ginger's first 3 candies weigh one third of the second box.", [], "other"),
    ("It takes 4 second per lap, so far 3 laps.", [], "other"),
    ("She pays so much that she has not yet saved $2.50, so she waits.", [C], "other"),
    ("The shows cost $4.50 each, but he shows a note of $20.", [N, V], "other"),
    ("So, the son also soaks 12 sofas.", [C], "other"),
    ("Next, Mr. Smith and Mrs. Lee show that 3.5 + 0.5 = 4.", [Q, V], "other"),
    ("Step 2: Then we can calculate the third part.", [Q], "other"),
    ("1. Second, we note the 12 eggs vs. Tom's 9.", [Q, V], "other"),
    ("Twice per month he writes a check to the church, or 24 checks each year.", [], "other"),
    ("24 guests checked out early and 30 checked in that afternoon.", [], "other"),
    ("Lucas counts 3 confirmed clients, and each writes a check for $20.", [], "other"),
    ("After the final wait, Paul has waited 145 minutes.", [], "other"),
    ("But wait, he missed the first train.", [N], "correct"),
    ("Check to see if 145 is right.", [], "verify"),
    ("To check our work, we plug 4 back into the equation.", [], "verify"),
]


def byte_tokenizer(folder):
    """A byte-level tokenizer with a few merges: it can write any text, and splits words and
    characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([sentence for sentence, _, _ in SENTENCES], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def text_model(qwen2, **changes):
    """A random model with that tokenizer -> folder, tokenizer. `qwen2` is conftest's fixture."""
    folder, _ = qwen2(vocab_size=340, tokenizer=False, **changes)
    return folder, byte_tokenizer(folder)


def make_reading(text, entropy=None, problem=0, **changes):
    """A reading whose tokens are words; 1 nat each, if nothing is said."""
    pieces = WORDS.findall(text)
    kinds, sentences = dissect_text(pieces)
    fields = {
        "problem": problem,
        "prompt": "p",
        "ids": list(range(len(pieces))),
        "pieces": pieces,
        "kinds": kinds,
        "sentences": sentences,
        "entropy": np.array([1.0] * len(pieces) if entropy is None else entropy),
        "likeliest": [],
        "difficulty": 1.0,
    }
    return Reading(**fields | changes)
