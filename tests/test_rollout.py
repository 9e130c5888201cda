"""rollout.py against a full forward pass per sequence (in transformers), the softmax, and a slow
loop for top-p."""

import pytest
import torch

import rollout
from conftest import FAMILIES, dice, distance, entropy_of, load_model, logits, picked
from lab.pretrain import countdown_tokenizer
from model import load
from plumbing.seeds import seeded_generator
from rollout import Episode, Sampler, sample, texts, truncate


def prompts_of(lengths):
    """A random prompt of each length."""
    g = dice(0)
    return [torch.randint(1, 112, (length,), generator=g).tolist() for length in lengths]


def responses(episodes):
    return [episode.response.tolist() for episode in episodes]


@pytest.fixture
def random():
    return seeded_generator(0, 0, "test")


@pytest.mark.parametrize(
    "changes, temperature, slots, eos, prefill",
    [
        # More sequences than slots; padding is 0, and so is the end.
        ({}, 1.0, 4, [0], 16384),
        # Several end tokens.
        ({"tie_word_embeddings": False}, 0.7, 7, [0, 3, 50], 16384),
        # More slots than sequences; a prefill of few prompts.
        ({"num_key_value_heads": 4}, 1.0, 100, [0], 20),
        # One prompt per prefill.
        ({"num_key_value_heads": 1}, 1.4, 3, [9], 1),
        *((family, 1.0, 4, [0], 16384) for family in FAMILIES),
    ],
)
def test_cached_refilled_ragged_decoding_equals_a_full_forward(
    qwen2, monkeypatch, random, changes, temperature, slots, eos, prefill
):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", prefill)
    folder, reference = qwen2(**changes)
    reference = reference.double()
    prompts = prompts_of([1, 12, 2, 7, 1, 30])
    sampler = Sampler(load_model(folder), slots, max_length=80, eos_ids=eos)
    episodes = sampler.generate(
        prompts,
        samples_per_prompt=5,
        max_new_tokens=50,
        temperature=temperature,
        generator=random,
    )

    different = {str(response) for response in responses(episodes)}
    lengths = {len(e.response) for e in episodes}
    assert len(different) == 30  # no slot repeats another
    assert len(lengths) > 5
    assert any(e.finished for e in episodes)
    for i, e in enumerate(episodes):
        assert e.prompt_index == i // 5
        assert e.prompt.tolist() == prompts[i // 5]
        assert_ends_where_it_says(e, eos, max_new_tokens=50)
        assert_equals_a_full_forward(e, reference, temperature)


def assert_ends_where_it_says(episode, eos, max_new_tokens):
    ends = [int(token) in eos for token in episode.response]
    assert not any(ends[:-1])
    assert episode.finished == ends[-1]
    assert episode.finished or len(episode.response) == max_new_tokens


def assert_equals_a_full_forward(episode, reference, temperature):
    """`reference` is transformers' model, in float64."""
    assert episode.logp.dtype == torch.float32
    assert episode.entropy.dtype == torch.float32
    tokens = torch.cat((episode.prompt, episode.response))
    z = reference(tokens[None]).logits[0] / temperature
    want = before_response(z, episode).log_softmax(-1)
    assert distance(episode.logp, picked(want, episode.response)) <= 1e-4
    assert distance(episode.entropy, entropy_of(want)) <= 1e-4


def before_response(z, episode):
    """What the model says when it has read up to the token before each of the response: of
    [P + R, V] the rows [R, V]."""
    last_of_prompt = len(episode.prompt) - 1
    return z[last_of_prompt:-1]


def test_an_end_token_on_the_last_allowed_place_counts_as_finished(model, random):
    every_token = range(112)
    sampler = Sampler(model, slots=64, max_length=8, eos_ids=every_token)
    episodes = sampler.generate(
        prompts_of([3]),
        samples_per_prompt=40,
        max_new_tokens=1,
        temperature=1.0,
        generator=random,
    )
    for e in episodes:
        assert e.finished
        assert len(e.response) == 1


@torch.no_grad()
def test_the_tail_with_fewer_rows_equals_the_rest(model):
    """When few sequences are left the batch shrinks; their values must not change."""
    model.embed_tokens.weight[0] *= 3  # ends now and then: some long, many short
    sampler = Sampler(model, slots=32, max_length=130, eos_ids=[0])
    episodes = sampler.generate(
        prompts_of([4, 6]),
        samples_per_prompt=16,
        max_new_tokens=120,
        temperature=1.0,
        generator=seeded_generator(1, 0, "test"),
    )
    lengths = sorted(len(e.response) for e in episodes)
    assert lengths[8] < lengths[-1] - 3 * rollout.CHECK_EVERY
    for e in episodes:
        tokens = torch.cat((e.prompt, e.response))
        z = logits(model, tokens[None])[0]
        want = before_response(z, e).log_softmax(-1)
        assert distance(e.logp, picked(want, e.response)) <= 1e-4


def chi_square(counts, expected):
    squares = (counts - expected) ** 2
    return float((squares / expected).sum())


def test_sampled_frequencies_match_the_softmax():
    z = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, 1.5, 0.2, -0.2, -2.5])
    n = 200_000
    temperature = 1.7
    token, logp, entropy = sample(
        z.expand(n, -1),
        temperature,
        top_p=1.0,
        generator=seeded_generator(0, 0, "chi"),
    )
    want = (z.double() / temperature).log_softmax(-1)
    assert distance(logp, want[token]) < 1e-5
    assert distance(entropy, entropy_of(want)) < 1e-5

    counts = token.bincount(minlength=12)
    expected = n * want.exp()
    expected_at_temperature_1 = n * z.double().softmax(-1)
    assert chi_square(counts, expected) < 31.26  # 99.9 % quantile, 11 degrees of freedom
    assert chi_square(counts, expected_at_temperature_1) > 1000  # the test has power


def test_the_samplers_own_frequencies_match_the_model(qwen2):
    folder, reference = qwen2()
    prompts = prompts_of([5])
    n = 20_000
    sampler = Sampler(load_model(folder), slots=500, max_length=7, eos_ids=[0])
    episodes = sampler.generate(
        prompts,
        samples_per_prompt=n,
        max_new_tokens=1,
        temperature=1.0,
        generator=seeded_generator(0, 0, "chi"),
    )
    token = torch.cat([e.response for e in episodes])
    counts = token.bincount(minlength=112)
    with torch.no_grad():
        z = reference.double()(torch.tensor(prompts)).logits
    p = z[0, -1].softmax(-1)

    likely = p > 0.005

    def rest_in_one_cell(x):
        rest = x[~likely].sum()
        return torch.cat((x[likely], rest[None]))

    counts = rest_in_one_cell(counts)
    expected = rest_in_one_cell(n * p)
    assert 10 < len(expected) < 60
    assert chi_square(counts, expected) < 100.0  # 99.9 % quantile at 60 degrees: 99.6


def first_above(p, u):
    """The first token whose cumulative probability exceeds u of the whole, added up one by one."""
    whole = sum(p)
    cumulative = 0.0
    for token, probability in enumerate(p):
        cumulative += probability
        if cumulative > u * whole:
            return token


def test_the_drawn_token_is_the_first_whose_cumulative_probability_exceeds_u(monkeypatch):
    """Against a loop in Python's floats: equal probabilities, impossible tokens first, amid and last,
    u at 0, at a boundary to the bit, beside it, and next to 1."""
    impossible = -1e4
    rows = [
        [0.0, 0.0, 0.0, 0.0],
        [impossible, 0.0, 0.0, impossible],
        [0.0, impossible, impossible, 0.0],
        [impossible, impossible, impossible, 1.0],
        [2.0, -3.0, 0.5, impossible],
    ]
    below = 2.0**-53
    numbers = [0.0, below, 0.25 - below, 0.25, 0.25 + below, 0.5, 0.75, 0.9, 1 - below]
    z = torch.tensor([row for row in rows for _ in numbers])
    u = torch.tensor(numbers * len(rows), dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: u.view(shape))

    token, _, _ = sample(z, 1.0, 1.0, generator=None)
    p = (z - z.logsumexp(dim=-1, keepdim=True)).exp()
    want = [first_above(row, number) for row, number in zip(p.tolist(), u.tolist())]
    assert token.tolist() == want
    assert want[:9] == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert want[9:18] == [1, 1, 1, 1, 1, 2, 2, 2, 2]


def slow_nucleus(p, top_p):
    """Likeliest first, until the mass reaches top_p."""
    kept = set()
    mass = 0.0
    for token in p.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.add(token)
        mass += float(p[token])
    return sorted(kept)


def test_top_p_equals_a_slow_loop():
    g = dice(0)
    for _ in range(50):
        z = torch.randn(8, generator=g) * 2
        uniform = float(torch.rand(1, generator=g))
        top_p = 0.01 + 0.98 * uniform
        want = slow_nucleus(z.softmax(-1), top_p)
        got = truncate(z[None], top_p)[0]
        kept = got > -torch.inf
        assert kept.nonzero()[:, 0].tolist() == want
        assert torch.equal(got[kept], z[kept])


def test_top_p_samples_and_scores_the_truncated_distribution():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    kept = p[:3] / 0.85
    n = 100_000
    token, logp, entropy = sample(
        p.log().expand(n, -1),
        temperature=1.0,
        top_p=0.8,
        generator=seeded_generator(0, 0, "chi"),
    )
    assert token.max() == 2
    counts = token.bincount(minlength=3)
    assert chi_square(counts, n * kept) < 13.8  # 99.9 % quantile, 2 degrees of freedom
    want = kept.log()
    assert distance(logp, want[token]) < 1e-5
    assert distance(entropy, entropy_of(want)) < 1e-5


def test_a_certain_token_has_no_entropy_and_no_nan(random):
    z = torch.tensor([[0.0, 200.0, -200.0]])
    token, logp, entropy = sample(z, 1.0, 1.0, random)
    assert token == 1
    assert logp == 0
    assert entropy == 0


def test_two_equal_tokens_and_an_impossible_one_have_the_entropy_of_two(random):
    z = torch.tensor([[0.0, 0.0, -1e4]])
    _, _, entropy = sample(z, 1.0, 1.0, random)
    assert entropy.item() == pytest.approx(0.693147, abs=1e-5)


def test_same_generator_same_episodes_and_streams_are_independent(model):
    def draw(seed, step, stream):
        sampler = Sampler(model, slots=5, max_length=40, eos_ids=[0])
        episodes = sampler.generate(
            prompts_of([3, 6]),
            samples_per_prompt=4,
            max_new_tokens=30,
            temperature=1.0,
            generator=seeded_generator(seed, step, stream),
        )
        return str(responses(episodes))

    first = draw(0, 1, "rollout")
    assert draw(0, 1, "rollout") == first
    other_seed = draw(1, 1, "rollout")
    other_step = draw(0, 2, "rollout")
    other_stream = draw(0, 1, "evaluate")
    assert len({first, other_seed, other_step, other_stream}) == 4


def test_bf16_decode_follows_the_master_weights_after_sync(random):
    model, tokenizer = load("base")
    sampler = Sampler(model, 16, 40, model.eos_ids, dtype=torch.bfloat16)
    assert sampler.decoder.head.dtype == torch.bfloat16
    assert model.head.dtype == torch.float32

    decoding = sampler.decoder.norm.weight
    master = model.norm.weight
    with torch.no_grad():
        master *= 1.5
    assert not torch.equal(decoding, master.bfloat16())
    sampler.sync()
    assert torch.equal(decoding, master.bfloat16())

    episodes = sampler.generate(
        [tokenizer.encode("1 2 3 4 -> 38 ?")],
        samples_per_prompt=8,
        max_new_tokens=30,
        temperature=1.0,
        generator=random,
    )
    for e in episodes:
        assert e.logp.dtype == torch.float32


def test_a_sampler_used_again_for_more_equals_a_fresh_one(model):
    def fresh():
        return Sampler(model, slots=64, max_length=40, eos_ids=[0])

    def draw(sampler, samples):
        episodes = sampler.generate(
            prompts_of([3, 6]),
            samples_per_prompt=samples,
            max_new_tokens=30,
            temperature=1.0,
            generator=seeded_generator(0, 0, "x"),
        )
        return responses(episodes)

    used = fresh()
    draw(used, 1)  # a cache of 2 rows ...
    assert draw(used, 20) == draw(fresh(), 20)  # ... and then 40 are needed
    used.free()
    assert used.buffer is None
    assert draw(used, 1) == draw(fresh(), 1)


def test_prefills_stay_within_their_budget(model, monkeypatch):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 60)
    sampler = Sampler(model, slots=32, max_length=130, eos_ids=[0])
    # All but a prompt's last token is prefilled.
    prompts = prompts_of([21, 21, 31, 5, 5, 5, 70, 2])
    ends = []
    first = 0
    while first < len(prompts):
        _, first = sampler.prefill(prompts, first)
        ends.append(first)
    # 2 x 20, then 2 x 30, 2 x 4 (3 x 69 is too much), 69 alone, 1
    assert ends == [2, 4, 6, 7, 8]


def test_the_tail_shrinks(model):
    rows = []

    def count_rows(_, inputs):
        tokens, *_ = inputs
        rows.append(len(tokens))

    model.register_forward_pre_hook(count_rows)
    with torch.no_grad():
        model.embed_tokens.weight[0] *= 3
    sampler = Sampler(model, slots=32, max_length=130, eos_ids=[0])
    sampler.generate(
        prompts_of([5, 5]),
        samples_per_prompt=16,
        max_new_tokens=100,
        temperature=1.0,
        generator=seeded_generator(1, 0, "test"),
    )
    assert max(rows) == 32
    assert rows[-1] <= 16


def test_only_the_final_end_token_is_left_out_of_the_text():
    """An unknown or a second end token inside an answer must not be dropped: that would repair the
    answer."""
    tokenizer = countdown_tokenizer()

    def episode(answer, finished):
        return Episode(
            prompt=torch.zeros(1),
            response=torch.tensor(tokenizer.encode(answer)),
            logp=None,
            entropy=None,
            finished=finished,
            prompt_index=0,
        )

    episodes = [
        episode("1 + 8 = 9 so <eos>", finished=True),
        episode("1 <unk> + 8", finished=False),
        episode("1 <unk> so <eos>", finished=True),
    ]
    assert texts(tokenizer, episodes) == [
        "1 + 8 = 9 so",
        "1 <unk> + 8",
        "1 <unk> so",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [[1] * 11]},
        {"prompts": [[]]},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
    ],
)
def test_bad_requests_are_refused(model, random, changes):
    good = {
        "prompts": [[1]],
        "samples_per_prompt": 1,
        "max_new_tokens": 10,
        "temperature": 1.0,
        "generator": random,
        "top_p": 1.0,
    }
    sampler = Sampler(model, slots=4, max_length=20, eos_ids=[0])
    with pytest.raises(ValueError):
        sampler.generate(**(good | changes))


def test_a_sampler_without_end_tokens_is_refused(model):
    with pytest.raises(ValueError):
        Sampler(model, slots=4, max_length=20, eos_ids=[])


def test_no_prompts_no_episodes(model, random):
    sampler = Sampler(model, slots=4, max_length=20, eos_ids=[0])
    episodes = sampler.generate(
        [],
        samples_per_prompt=3,
        max_new_tokens=10,
        temperature=1.0,
        generator=random,
    )
    assert episodes == []


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(model):
    """112 words: 111 is the last. Without the check this is an IndexError, on a GPU an abort."""
    sampler = Sampler(model, slots=4, max_length=20, eos_ids=[0])
    sampler.generate([[1, 111]], 1, 2, 1.0, dice(0))
    with pytest.raises(ValueError, match="a prompt has the token 112, and the model has 112: the"):
        sampler.generate([[1, 2], [1, 112, 3]], 1, 2, 1.0, dice(0))
