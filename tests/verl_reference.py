"""What verl 0.9.1 makes of a small random batch: its losses, their gradients, its advantages. Makes
tests/data/verl.safetensors, which test_methods.py compares lab/methods.py with:

    pip download --no-deps verl==0.9.1
    python -m zipfile -e verl-0.9.1-py3-none-any.whl unpacked
    python tests/verl_reference.py unpacked

Only its core_algos.py is run. What that imports and does not need is left empty, so nothing of verl
has to be installed.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

VERSION = "0.9.1"
ANSWERS = 12  # three groups of four
TOKENS = 20
CLIP_LOW = 0.1
CLIP_HIGH = 0.15
# GSPO's ratios, of whole answers, are nearer to 1.
GSPO_CLIP_LOW = 0.02
GSPO_CLIP_HIGH = 0.03
KL_SHARE = 0.1  # of tokens
CLIP_SHARE = 0.3  # more than lie between the bounds, so that verl's draw takes all of these
CLIP_BOUNDS = (0.5, 2.0)
MOST_TOKENS = 24  # Dr. GRPO's
REWARD = [1.0, 1, -1, -1, 1, -1, -1, -1, -1, -1, -1, -1]  # the last group teaches nothing
TARGET = Path(__file__).parent / "data" / "verl.safetensors"


class ActorConfig:
    """In place of verl's: the settings that its losses ask for."""

    global_batch_info = {}
    policy_loss = types.SimpleNamespace(
        clip_cov_ratio=CLIP_SHARE,
        clip_cov_lb=CLIP_BOUNDS[0],
        clip_cov_ub=CLIP_BOUNDS[1],
        kl_cov_ratio=KL_SHARE,
        ppo_kl_coef=1.0,
    )

    def __init__(self, low=CLIP_LOW, high=CLIP_HIGH):
        self.clip_ratio = low
        self.clip_ratio_low = low
        self.clip_ratio_high = high

    def get(self, name, default=None):
        return getattr(self, name, default)


def empty_module(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def load_core_algos(folder: Path):
    """verl.trainer.ppo.core_algos, from an unpacked wheel."""
    if not (folder / f"verl-{VERSION}.dist-info").is_dir():
        sys.exit(f"{folder} holds no verl {VERSION}")
    for package in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "verl.workers"):
        empty_module(package, __path__=[str(folder / package.replace(".", "/"))])
    empty_module("omegaconf", DictConfig=dict)
    empty_module("tensordict", TensorDict=dict)
    empty_module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
    empty_module("verl.workers.config", ActorConfig=ActorConfig)
    groupwise = importlib.import_module("verl.utils.groupwise")
    sys.modules["verl.utils"].as_torch_index = groupwise.as_torch_index
    sys.modules["verl.utils"].group_mean_std = groupwise.group_mean_std
    return importlib.import_module("verl.trainer.ppo.core_algos")


def top_covariances(advantage, logp, mask):
    """Which tokens have the largest, as KL-Cov takes them; sorted places."""
    a = advantage[mask]
    p = logp[mask]
    found = (a - a.mean()) * (p - p.mean())
    return found.topk(int(KL_SHARE * len(found))).indices.sort().values


def make_batch():
    """The first one in which a drift of the policy leaves the tokens with the largest covariances as
    they were: lab/methods.py takes the sampler's log-probabilities for them, verl the current ones."""
    seed = 0
    while True:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(8, TOKENS + 1, (ANSWERS,), generator=g)
        mask = torch.arange(TOKENS) < lengths[:, None]
        logp = -2 * torch.rand(ANSWERS, TOKENS, generator=g).pow(2) - 0.01
        old_logp = logp + 0.15 * torch.randn(ANSWERS, TOKENS, generator=g)
        per_answer = torch.randn(ANSWERS, 1, generator=g)
        advantage = per_answer * mask
        before = top_covariances(advantage, old_logp, mask)
        if torch.equal(before, top_covariances(advantage, logp, mask)):
            return {
                "logp": logp,
                "old_logp": old_logp,
                "advantage": advantage,
                "mask": mask,
                "lengths": lengths,
                "reward": torch.tensor(REWARD),
                "group": torch.arange(ANSWERS) // 4,
            }
        seed += 1


def losses(algos, batch):
    """Name -> loss and its gradient with respect to the log-probabilities."""
    ways = {
        "kl_cov": "token-mean",
        "clip_cov": "token-mean",
        "cispo": "token-mean",
        "gspo": "seq-mean-token-mean",
        "vanilla": "token-mean",
    }
    found = {}
    for name, way in ways.items():
        config = ActorConfig()
        if name == "gspo":
            config = ActorConfig(GSPO_CLIP_LOW, GSPO_CLIP_HIGH)
        logp = batch["logp"].clone().requires_grad_()
        loss, _ = algos.get_policy_loss_fn(name)(
            old_log_prob=batch["old_logp"],
            log_prob=logp,
            advantages=batch["advantage"],
            response_mask=batch["mask"].float(),
            loss_agg_mode=way,
            config=config,
        )
        loss.backward()
        found[f"{name}.loss"] = loss.detach()
        found[f"{name}.gradient"] = logp.grad

    # Dr. GRPO's way to divide, of a loss per token that is simply A log pi.
    logp = batch["logp"].clone().requires_grad_()
    loss = algos.agg_loss(
        -logp * batch["advantage"],
        batch["mask"].float(),
        "seq-mean-token-sum-norm",
        loss_scale_factor=MOST_TOKENS,
    )
    loss.backward()
    found["dr_grpo.gradient"] = logp.grad
    return found


def advantages(algos, batch):
    """Name -> [N, T]."""
    mask = batch["mask"].float()
    token_reward = torch.zeros(ANSWERS, TOKENS)
    token_reward[torch.arange(ANSWERS), batch["lengths"] - 1] = batch["reward"]
    ways = {
        "rloo": (algos.compute_rloo_outcome_advantage, {}),
        "reinforce++": (algos.compute_reinforce_plus_plus_baseline_outcome_advantage, {}),
        "dr_grpo": (
            algos.compute_grpo_outcome_advantage,
            {"norm_adv_by_std_in_grpo": False},
        ),
    }
    found = {}
    for name, (function, options) in ways.items():
        advantage, _ = function(token_reward, mask, batch["group"].numpy(), **options)
        found[f"{name}.advantage"] = advantage.contiguous()
    return found


def main():
    algos = load_core_algos(Path(sys.argv[1]))
    batch = make_batch()
    tensors = batch | losses(algos, batch) | advantages(algos, batch)
    versions = {"verl": VERSION, "torch": torch.__version__.partition("+")[0]}
    save_file(tensors, TARGET, metadata=versions)
    TARGET.chmod(0o644)


if __name__ == "__main__":
    main()
