"""rollout.py against a full forward pass per sequence (in transformers), the softmax, and enumeration."""

import pytest
import torch

import rollout
from conftest import FAMILIES
from lab.pretrain import countdown_tokenizer
from model import load
from rollout import Episode, Sampler, sample, seeded_generator, texts, truncate


def prompts_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 112, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("temperature, slots, eos, prefill, changes", [
    (1.0, 4, (0,), 16384, {}),                              # more sequences than slots; padding is 0, and so is the end
    (0.7, 7, (0, 3, 50), 16384, {"tie_word_embeddings": False}),        # several end tokens
    (1.0, 100, (0,), 20, {"num_key_value_heads": 4}),       # more slots than sequences; a prefill of few prompts
    (1.4, 3, (9,), 1, {"num_key_value_heads": 1}),          # one prompt per prefill
    *((1.0, 4, (0,), 16384, family) for family in FAMILIES)])
def test_cached_refilled_ragged_decoding_equals_a_full_forward(qwen2, monkeypatch, temperature, slots, eos, prefill, changes):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", prefill)
    folder, reference = qwen2(**changes)
    reference = reference.double()
    model, _ = load(str(folder))
    prompts = prompts_of([1, 12, 2, 7, 1, 30])
    episodes = Sampler(model, slots, 80, eos).generate(prompts, 5, 50, temperature, seeded_generator(0, 0, "test"))
    assert [e.prompt_index for e in episodes] == [i for i in range(6) for _ in range(5)]
    assert len({tuple(e.response.tolist()) for e in episodes}) == 30        # no slot repeats another
    for e in episodes:
        assert e.prompt.tolist() == prompts[e.prompt_index]
        assert e.logp.dtype == e.entropy.dtype == torch.float32
        ends = [int(t) in eos for t in e.response]
        assert not any(ends[:-1]) and e.finished == ends[-1] and (e.finished or len(e.response) == 50)
        z = reference(torch.cat((e.prompt, e.response))[None]).logits[0, len(e.prompt) - 1:-1] / temperature
        want = z.log_softmax(-1)
        assert (e.logp - want.gather(1, e.response[:, None])[:, 0]).abs().max() <= 1e-4
        assert (e.entropy + (want.exp() * want).sum(-1)).abs().max() <= 1e-4
    assert any(e.finished for e in episodes) and len({len(e.response) for e in episodes}) > 5


def test_an_end_token_on_the_last_allowed_place_counts_as_finished(qwen2):
    model, _ = load(str(qwen2()[0]))
    episodes = Sampler(model, 64, 8, range(112)).generate(prompts_of([3]), 40, 1, 1.0, seeded_generator(0, 0, "test"))
    assert all(e.finished and len(e.response) == 1 for e in episodes)


def test_the_tail_with_fewer_rows_equals_the_rest(qwen2):
    """When few sequences are left the batch shrinks; their values must not change."""
    folder, reference = qwen2()
    model, _ = load(str(folder))
    with torch.no_grad():
        model.embed_tokens.weight[0] *= 3                   # ends now and then: some long, many short
    episodes = Sampler(model, 32, 130, (0,)).generate(prompts_of([4, 6]), 16, 120, 1.0, seeded_generator(1, 0, "test"))
    lengths = sorted(len(e.response) for e in episodes)
    assert lengths[8] < lengths[-1] - 3 * rollout.CHECK_EVERY
    for e in episodes:
        tokens = torch.cat((e.prompt, e.response))[None]
        z = torch.nn.functional.linear(model(tokens, torch.arange(tokens.shape[1])[None]), model.head)[0]
        want = z.log_softmax(-1)[len(e.prompt) - 1:-1].gather(1, e.response[:, None])[:, 0]
        assert (e.logp - want).abs().max() <= 1e-4


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_sampled_frequencies_match_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, 1.5, 0.2, -0.2, -2.5])
    n, temperature = 200_000, 1.7
    token, logp, entropy = sample(logits.expand(n, -1), temperature, 1.0, seeded_generator(0, 0, "chi"))
    p = (logits.double() / temperature).softmax(-1)
    assert chi_square(token.bincount(minlength=12), n * p) < 31.26         # 99.9 % quantile, 11 degrees of freedom
    assert chi_square(token.bincount(minlength=12), n * logits.double().softmax(-1)) > 1000     # the test has power
    assert (logp - p.log()[token]).abs().max() < 1e-5
    assert (entropy + (p * p.log()).sum()).abs().max() < 1e-5


def test_the_samplers_own_frequencies_match_the_model(qwen2):
    folder, reference = qwen2()
    model, _ = load(str(folder))
    prompt = prompts_of([5])[0]
    n = 20_000
    episodes = Sampler(model, 500, 7, (0,)).generate([prompt], n, 1, 1.0, seeded_generator(0, 0, "chi"))
    p = reference.double()(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    likely = p > 0.005                                      # the rest goes into one cell
    counts = torch.tensor([int(e.response[0]) for e in episodes]).bincount(minlength=112)
    counts, p = (torch.cat((x[likely], x[~likely].sum()[None])) for x in (counts, p))
    assert 10 < len(p) < 60 and chi_square(counts, n * p) < 100.0           # 99.9 % quantile at 60 degrees: 99.6


def test_top_p_equals_enumeration():
    """The nucleus by a slow loop: likeliest first, until the mass reaches top_p."""
    g = torch.Generator().manual_seed(0)
    for trial in range(50):
        z = torch.randn(8, generator=g) * 2
        top_p = float(torch.rand(1, generator=g)) * 0.98 + 0.01
        p = z.softmax(-1)
        keep, mass = set(), 0.0
        for i in sorted(range(8), key=lambda i: -p[i]):
            if mass >= top_p:
                break
            keep.add(i)
            mass += float(p[i])
        kept = truncate(z[None], top_p)[0]
        assert {i for i in range(8) if kept[i] > -torch.inf} == keep
        assert torch.equal(kept[sorted(keep)], z[sorted(keep)])


def test_top_p_samples_and_scores_the_truncated_distribution():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    n = 100_000
    token, logp, entropy = sample(p.log().expand(n, -1), 1.0, 0.8, seeded_generator(0, 0, "chi"))
    kept = torch.tensor([0.4, 0.3, 0.15]) / 0.85
    assert token.max() == 2 and chi_square(token.bincount(minlength=3), n * kept) < 13.8   # 99.9 %, 2 degrees
    assert (logp - kept.log()[token]).abs().max() < 1e-5
    assert (entropy + (kept * kept.log()).sum()).abs().max() < 1e-5


def test_a_certain_token_has_no_entropy_and_no_nan():
    token, logp, entropy = sample(torch.tensor([[0.0, 200.0, -200.0], [0.0, 0.0, -1e4]]), 1.0, 1.0, seeded_generator(0, 0, "x"))
    assert token[0] == 1 and logp[0] == 0 and entropy[0] == 0
    assert entropy[1].item() == pytest.approx(0.693147, abs=1e-5)


def test_same_generator_same_episodes_and_streams_are_independent(qwen2):
    model, _ = load(str(qwen2()[0]))
    draw = lambda *key: [e.response.tolist() for e in Sampler(model, 5, 40, (0,)).generate(
        prompts_of([3, 6]), 4, 30, 1.0, seeded_generator(*key))]
    assert draw(0, 1, "rollout") == draw(0, 1, "rollout")
    assert len({str(draw(*key)) for key in ((0, 1, "rollout"), (1, 1, "rollout"), (0, 2, "rollout"), (0, 1, "evaluate"))}) == 4


def test_bf16_decode_follows_the_master_weights_after_sync(qwen2):
    model, _ = load("base")
    sampler = Sampler(model, 16, 40, model.eos_ids, torch.bfloat16)
    assert sampler.decoder.head.dtype == torch.bfloat16 and model.head.dtype == torch.float32
    with torch.no_grad():
        model.norm.weight *= 1.5
    assert not torch.equal(sampler.decoder.norm.weight, model.norm.weight.bfloat16())
    sampler.sync()
    assert torch.equal(sampler.decoder.norm.weight, model.norm.weight.bfloat16())
    episodes = sampler.generate([[3, 4, 5, 6, 110, 40, 111]], 8, 30, 1.0, seeded_generator(0, 0, "x"))
    assert all(e.logp.dtype == torch.float32 for e in episodes)


def test_a_sampler_used_again_for_more_equals_a_fresh_one(qwen2):
    model, _ = load(str(qwen2()[0]))
    prompts = prompts_of([3, 6])
    draw = lambda sampler, n: [e.response.tolist() for e in sampler.generate(prompts, n, 30, 1.0, seeded_generator(0, 0, "x"))]
    used = Sampler(model, 64, 40, (0,))
    draw(used, 1)                                           # a cache of 2 rows ...
    assert draw(used, 20) == draw(Sampler(model, 64, 40, (0,)), 20)         # ... and then 40 are needed
    used.free()
    assert used.cache is None and draw(used, 1) == draw(Sampler(model, 64, 40, (0,)), 1)


def test_prefills_stay_within_their_budget_and_the_tail_shrinks(qwen2, monkeypatch):
    model, _ = load(str(qwen2()[0]))
    sampler = Sampler(model, 32, 130, (0,))
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 60)
    prompts, ends = prompts_of([21, 21, 31, 5, 5, 5, 70, 2]), [0]
    while ends[-1] < len(prompts):
        ends.append(sampler.prefill(prompts, ends[-1])[1])
    assert ends == [0, 3 - 1, 4, 6, 7, 8]                   # 2 x 20, then 2 x 30, 2 x 4 (3 x 69 is too much), 69 alone, 1
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        model.embed_tokens.weight[0] *= 3
    sampler.generate(prompts[3:5], 16, 100, 1.0, seeded_generator(1, 0, "test"))
    assert max(rows) == 32 and rows[-1] <= 16


def test_only_the_final_end_token_is_left_out_of_the_text():
    """An unknown or a second end token inside an answer must not be dropped: that would repair the answer."""
    tokenizer = countdown_tokenizer()
    episode = lambda text, finished: Episode(torch.zeros(1), torch.tensor(tokenizer.encode(text)), None, None, finished, 0)
    found = texts(tokenizer, [episode("1 + 8 = 9 so <eos>", True), episode("1 <unk> + 8", False), episode("1 <unk> so <eos>", True)])
    assert found == ["1 + 8 = 9 so", "1 <unk> + 8", "1 <unk> so"]


def test_bad_requests_are_refused(qwen2):
    model, _ = load(str(qwen2()[0]))
    sampler, g = Sampler(model, 4, 20, (0,)), seeded_generator(0, 0, "x")
    for prompts, new, temperature, top_p in (([[1] * 11], 10, 1.0, 1.0), ([[]], 10, 1.0, 1.0), ([[1]], 10, 0.0, 1.0),
                                             ([[1]], 10, 1.0, 0.0), ([[1]], 10, 1.0, 1.1), ([[1]], 0, 1.0, 1.0),
                                             ([[1]], 10, float("nan"), 1.0), ([[1]], 10, float("inf"), 1.0)):
        with pytest.raises(ValueError):
            sampler.generate(prompts, 1, new, temperature, g, top_p)
    with pytest.raises(ValueError):
        Sampler(model, 4, 20, ())
    assert sampler.generate([], 3, 10, 1.0, g) == []
