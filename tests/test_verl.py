"""lab/verl_entropy_advantage.py: around a loss worked out by hand, in place of verl's; and where verl
is installed (docs/engines.md), verl's own loss, its gradient and the steps of its actor worker
against ours."""

import math
import os
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from advantage import policy_loss, shape_with_entropy
from conftest import ROOT, entropy_of, picked
from model import load, score
from plumbing.batch import collate, pad_responses
from plumbing.settings import Settings
from rollout import Episode
from test_trl_grpo import distance as far
from test_trl_grpo import way
from train import update

NAME = "lab.verl_entropy_advantage"


# ---- Without verl: the same names, a loss that can be worked out by hand.


@pytest.fixture
def stand_ins(monkeypatch):
    """-> what stands in place of verl.workers.engine_workers. Its loss is a plain sum; its batches
    are dicts, and the rows of its model's output padded already."""
    monkeypatch.delenv("ENTROPY_ALPHA", raising=False)
    monkeypatch.delenv("ENTROPY_KAPPA", raising=False)

    def ppo_loss(config, model_output, data, dp_group=None):
        return -(model_output["log_probs"] * data["advantages"]).sum(), {"given": data}

    contents = {
        "verl": {},
        "verl.workers": {},
        "verl.workers.engine_workers": {"ppo_loss": ppo_loss},
        "verl.workers.utils": {},
        "verl.workers.utils.padding": {"no_padding_2_padding": lambda packed, data: packed},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    workers = sys.modules["verl.workers.engine_workers"]
    sys.modules["verl.workers"].engine_workers = workers
    return workers


def hand_made():
    """Advantages, and a model's output of which log-probability and entropy have a gradient."""
    advantage = torch.tensor([[2.0, 2.0, -1.0, 0.0]])
    logp = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    entropy = torch.tensor([[1.0, 9.0, 9.0, 9.0]], requires_grad=True)
    return {"advantages": advantage}, {"log_probs": logp, "entropy": entropy}


def test_by_hand(stand_ins):
    """psi = min(0.4 H, |A| / 2) = 0.4, 1, 0.5, 0. So A becomes 2.4, 3, -0.5, 0, and minus the sum of
    A log pi is 2.4 + 6 - 1.5 + 0."""
    runpy.run_module(NAME)
    data, output = hand_made()
    loss, metrics = stand_ins.ppo_loss(config=None, model_output=output, data=data)
    loss.backward()
    assert loss.item() == pytest.approx(6.9)
    want = [-2.4, -3.0, 0.5, 0.0]
    assert output["log_probs"].grad.tolist() == [pytest.approx(want)]
    assert output["entropy"].grad is None
    assert metrics["given"] is not data


def test_a_second_pass_over_the_batch_by_hand(stand_ins):
    """Shaped twice, A would be 2.8, 4, 0 and 0, and the loss 10.8."""
    runpy.run_module(NAME)
    data, output = hand_made()
    for _ in range(2):
        loss, _ = stand_ins.ppo_loss(None, output, data)
        assert loss.item() == pytest.approx(6.9)
    assert data["advantages"].tolist() == [[2.0, 2.0, -1.0, 0.0]]


def test_alpha_and_kappa_are_the_environments(stand_ins, monkeypatch, capsys):
    """min(0.1 H, |A| / 4) = 0.1, 0.5, 0.25, 0: the loss is 2.1 + 5 - 2.25 + 0."""
    monkeypatch.setenv("ENTROPY_ALPHA", "0.1")
    monkeypatch.setenv("ENTROPY_KAPPA", "4")
    runpy.run_module(NAME)
    data, output = hand_made()
    loss, _ = stand_ins.ppo_loss(None, output, data)
    assert loss.item() == pytest.approx(4.85)
    assert capsys.readouterr().out == "entropy advantage: alpha 0.1, kappa 4.0\n"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ENTROPY_ALPHA", "much", "ENTROPY_ALPHA must be a number; it is 'much'"),
        ("ENTROPY_ALPHA", "-1", "ENTROPY_ALPHA must be at least 0; it is -1.0"),
        ("ENTROPY_KAPPA", "1", "ENTROPY_KAPPA must be greater than 1; it is 1.0"),
        ("ENTROPY_KAPPA", "nan", "ENTROPY_KAPPA must be greater than 1; it is nan"),
    ],
)
def test_values_that_make_no_sense(stand_ins, monkeypatch, name, value, sentence):
    before = stand_ins.ppo_loss
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        runpy.run_module(NAME)
    assert str(error.value) == sentence
    assert stand_ins.ppo_loss is before


def test_without_entropy(stand_ins):
    runpy.run_module(NAME)
    data, output = hand_made()
    del output["entropy"]
    with pytest.raises(ValueError, match="needs actor_rollout_ref.actor.calculate_entropy=True"):
        stand_ins.ppo_loss(None, output, data)


# ---- With verl.

ANSWERS = 16
PROMPT = 12  # tokens at most
RESPONSE = 24
ALPHA = 0.4
LR = 0.5
# Wide enough for the dual clip, a bound of verl's that ours has not, never to be reached.
DUAL_CLIP = 1e9
STEP = f"""+actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.model.path=base
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
    actor_rollout_ref.actor.strategy=fsdp2
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c={DUAL_CLIP}
    actor_rollout_ref.actor.optim.optimizer=SGD
    actor_rollout_ref.actor.optim.lr={LR}
    actor_rollout_ref.actor.optim.weight_decay=0
    actor_rollout_ref.actor.optim.clip_grad=1e9"""


@pytest.fixture
def ppo_loss():
    """verl's."""
    package = pytest.importorskip("verl", reason="no verl 0.9.1 (docs/engines.md)")
    assert package.__version__ == "0.9.1"
    from verl.workers.utils.losses import ppo_loss

    return ppo_loss


@pytest.fixture
def wrapped(ppo_loss):
    """wrapped(alpha) -> verl's loss with our advantages."""
    from lab.verl_entropy_advantage import with_entropy_advantage

    return lambda alpha: with_entropy_advantage(ppo_loss, alpha, 2.0)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def random_episodes():
    generator = dice()

    def token_ids(least, most):
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return torch.randint(1, 112, (length,), generator=generator)

    episodes = []
    for i in range(ANSWERS):
        prompt = token_ids(4, PROMPT)
        response = token_ids(2, RESPONSE)
        unknown = torch.full(response.shape, math.nan)
        episodes.append(Episode(prompt, response, unknown, unknown, False, i // 4))
    return episodes


def mask_of(episodes):
    return pad_responses([episode.logp for episode in episodes])[1]


def random_advantage(mask):
    """[N, R], the same for all tokens of an answer, and 0 in four answers."""
    per_answer = 2 * torch.randn(ANSWERS, 1, generator=dice(1))
    per_answer[:4] = 0.0
    return per_answer * mask


def of_an_older_policy(logp, mask):
    """Log-probabilities, such that some ratios are clipped."""
    return (logp.detach() + 0.2 * torch.randn(logp.shape, generator=dice(2))) * mask


def padded(episodes, numbers):
    """As verl's older trainer has a batch: prompts at the right end of their columns. `numbers`:
    name -> [N, R]."""
    prompts = torch.zeros(ANSWERS, PROMPT, dtype=torch.long)
    prompt_mask = torch.zeros_like(prompts)
    for i, episode in enumerate(episodes):
        prompts[i, -len(episode.prompt) :] = episode.prompt
        prompt_mask[i, -len(episode.prompt) :] = 1
    responses = pad_sequence([episode.response for episode in episodes], batch_first=True)
    response_mask = mask_of(episodes).long()
    attention_mask = torch.cat((prompt_mask, response_mask), dim=1)
    ids = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": torch.cat((prompts, responses), dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
    }
    return ids | numbers


def packed(episodes, numbers):
    """As its newer trainer has it: without padding."""
    lengths = [len(episode.response) for episode in episodes]
    sequences = [torch.cat((episode.prompt, episode.response)) for episode in episodes]
    rows = {
        "prompts": [episode.prompt for episode in episodes],
        "responses": [episode.response for episode in episodes],
        "input_ids": sequences,
        "position_ids": [torch.arange(len(sequence)) for sequence in sequences],
        "response_mask": [torch.ones(length, dtype=torch.long) for length in lengths],
    }
    rows["loss_mask"] = rows["response_mask"]
    for name, table in numbers.items():
        rows[name] = [row[:length] for row, length in zip(table, lengths)]
    as_nested = torch.nested.as_nested_tensor
    return {name: as_nested(tensors, layout=torch.jagged) for name, tensors in rows.items()}


class Direct:
    """verl's loss as its engines call it, of random logits in place of a model's."""

    def __init__(self, layout):
        from verl.utils.tensordict_utils import get_tensordict
        from verl.workers.config import FSDPActorConfig

        self.episodes = random_episodes()
        self.sequences = [torch.cat((e.prompt, e.response)) for e in self.episodes]
        self.lengths = [len(sequence) for sequence in self.sequences]
        # From almost certain to almost even, so that some tokens reach the bound |A| / kappa.
        sharpness = 8 * torch.rand(sum(self.lengths), 1, generator=dice(3))
        logits = sharpness * torch.randn(sum(self.lengths), 112, generator=dice(4))
        self.logits = logits.requires_grad_()
        self.mask = mask_of(self.episodes)
        self.tokens = int(self.mask.sum())
        self.advantage = random_advantage(self.mask)
        self.logp, self.entropy = [self.of_responses(x) for x in self.of_every_token()]
        self.old_logp = of_an_older_policy(self.logp, self.mask)

        numbers = {"old_log_probs": self.old_logp, "advantages": self.advantage.clone()}
        sizes = {"dp_size": 1, "batch_num_tokens": self.tokens, "global_batch_size": ANSWERS}
        self.data = get_tensordict(layout(self.episodes, numbers), sizes)
        self.config = FSDPActorConfig(
            rollout_n=4,
            ppo_micro_batch_size_per_gpu=4,
            clip_ratio_high=0.28,
            clip_ratio_c=DUAL_CLIP,
        )

    def of_every_token(self):
        """Log-probabilities and entropies, each [all tokens]; a place speaks of the next token."""
        words = self.logits.log_softmax(-1)
        return picked(words, torch.cat(self.sequences).roll(-1)), entropy_of(words)

    def of_responses(self, numbers):
        """[all tokens] -> [N, R]"""
        rows = numbers.split(self.lengths)
        wanted = [row[len(e.prompt) - 1 : -1] for row, e in zip(rows, self.episodes)]
        return pad_sequence(wanted, batch_first=True)

    def verls(self, loss_function):
        """-> loss, gradient."""
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        output = {}
        for name, numbers in zip(("log_probs", "entropy"), self.of_every_token()):
            output[name] = torch.nested.nested_tensor_from_jagged(numbers, offsets)
        loss, _ = loss_function(config=self.config, model_output=output, data=self.data)
        [gradient] = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient

    def ours(self, alpha):
        """-> loss, gradient."""
        logp, entropy = [self.of_responses(x) for x in self.of_every_token()]
        shaped = shape_with_entropy(self.advantage, entropy.detach(), alpha, 2.0)
        loss, _ = policy_loss(logp, self.old_logp, shaped, self.mask, 0.2, 0.28, self.tokens)
        [gradient] = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient


both_layouts = pytest.mark.parametrize("layout", [padded, packed])


@both_layouts
def test_verls_loss_and_gradient_are_ours(wrapped, layout):
    """Of shape_with_entropy and policy_loss. A gradient through the entropy would be far off."""
    direct = Direct(layout)
    ratio = (direct.logp - direct.old_logp).exp()
    assert (ratio > 1.28).any() and (ratio[direct.mask] < 0.8).any()
    bound = direct.advantage.abs() / 2
    assert 20 < ((ALPHA * direct.entropy < bound) & (bound > 0)).sum() < (bound > 0).sum() - 20
    loss, gradient = direct.verls(wrapped(ALPHA))
    our_loss, our_gradient = direct.ours(ALPHA)
    _, unshaped = direct.ours(0.0)
    print(f"{far(our_gradient, gradient):.1e}; unshaped {far(unshaped, gradient):.2f}")
    assert abs(loss - our_loss) < 1e-6
    assert far(our_gradient, gradient) < 1e-5
    assert far(unshaped, gradient) > 0.1


@both_layouts
def test_a_second_epoch_is_not_shaped_twice(wrapped, layout):
    direct = Direct(layout)
    shaped = wrapped(ALPHA)
    before = direct.data["advantages"]
    first = direct.verls(shaped)
    second = direct.verls(shaped)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert direct.data["advantages"] is before
    dense = before.to_padded_tensor(0.0) if before.is_nested else before
    assert torch.equal(dense, direct.advantage)


@both_layouts
def test_alpha_0_is_verl_without_it_to_the_bit(ppo_loss, wrapped, layout):
    direct = Direct(layout)
    without = direct.verls(ppo_loss)
    with_nothing = direct.verls(wrapped(0.0))
    assert all(torch.equal(a, b) for a, b in zip(without, with_nothing))


@both_layouts
def test_the_sign_is_kept(wrapped, monkeypatch, layout):
    """Of what verl's loss is given: A > 0 becomes at most 1.5 A, A < 0 at least A / 2 in size, also
    with a weight that puts every token at its bound; and A = 0 stays 0."""
    from verl.trainer.ppo import core_algos

    given = []
    vanilla = core_algos.get_policy_loss_fn("vanilla")

    def spy(**arguments):
        given.append(arguments["advantages"])
        return vanilla(**arguments)

    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "vanilla", spy)
    direct = Direct(layout)
    for alpha in (ALPHA, 1e6):
        direct.verls(wrapped(alpha))
    plain = direct.advantage
    shaped, at_the_bound = given
    assert torch.equal(shaped.sign(), plain.sign())
    assert (plain == 0).any() and ((shaped - plain)[plain != 0] > 0).all()
    assert torch.equal(at_the_bound, plain + plain.abs() / 2)


def actor_step(folder, epochs, flags):
    """Has verl's actor worker train on folder/batch.pt -> how it changes the weights, its words."""
    command = [sys.executable, "tests/verl_actor_step.py", str(folder), str(epochs), "0.8"]
    done = subprocess.run(
        [*command, *STEP.split(), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(folder / "weights.pt")
    return way({name.removeprefix("model."): tensor for name, tensor in state.items()}), done.stdout


def our_steps(episodes, old_logp, advantage, epochs, alpha):
    """The same by train.update."""
    model, _ = load("base")
    settings = Settings(temperature=0.8, alpha=alpha, grad_clip=1e9)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(epochs):
        update(model, optimizer, episodes, old_logp, advantage, settings)
    return way(model.state_dict())


ON = [
    "actor_rollout_ref.model.external_lib=lab.verl_entropy_advantage",
    "actor_rollout_ref.actor.calculate_entropy=True",
]


@pytest.mark.parametrize(
    ("layout", "flags", "alpha", "epochs"),
    [(padded, ON, ALPHA, 1), (packed, ON, ALPHA, 2), (packed, [], 0.0, 1)],
)
def test_verls_actor_worker_takes_our_steps(ppo_loss, tmp_path, layout, flags, alpha, epochs):
    """verl's configuration, its worker with external_lib, its FSDP2 engine with four micro-batches,
    in one process on a CPU, against train.update; and without external_lib against alpha = 0."""
    episodes = random_episodes()
    mask = mask_of(episodes)
    advantage = random_advantage(mask)
    model, _ = load("base")
    batch = collate(episodes, torch.device("cpu"))
    with torch.no_grad():
        scored = score(model, batch.tokens, batch.prompt_len, batch.total_len, 0.8)
    old_logp = of_an_older_policy(batch.unalign(scored[0], mask.shape[1]), mask)
    numbers = {"old_log_probs": old_logp, "advantages": advantage}
    torch.save(layout(episodes, numbers), tmp_path / "batch.pt")

    theirs, words = actor_step(tmp_path, epochs, flags)
    ours = our_steps(episodes, old_logp, advantage, epochs, alpha)
    other = our_steps(episodes, old_logp, advantage, epochs, ALPHA - alpha)
    print(f"{far(ours, theirs):.1e}; with the other alpha {far(other, theirs):.2f}")
    rounding = 4e-5 if epochs == 1 else 2e-4
    assert far(ours, theirs) < rounding
    assert far(other, theirs) > 0.05
    assert ("entropy advantage: alpha 0.4, kappa 2.0" in words) == (flags == ON)


def test_the_command_of_the_page(ppo_loss):
    """docs/engines.md: verl knows every flag of it, and has nothing to object to."""
    from verl_actor_step import read_flags

    from verl.utils.config import omega_conf_to_dataclass, validate_config

    page = (ROOT / "docs/engines.md").read_text()
    [flags] = re.findall(r"^ {4}python -m verl.trainer.main_ppo (.*)$", page, re.M)
    config = read_flags(flags.split())
    validate_config(config, use_reference_policy=False, use_critic=False)
    model = config.actor_rollout_ref.model
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert model.external_lib == NAME
    assert actor.calculate_entropy
    assert config.data.train_batch_size / actor.ppo_mini_batch_size == 16
