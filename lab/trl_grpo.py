"""The same tasks, rewards and entropy advantage with TRL's GRPOTrainer: `python -m lab.trl_grpo`
(pip install trl datasets).

For what no longer fits one card: TRL has accelerate, FSDP2, DeepSpeed and vLLM under it. Every
field of its GRPOConfig is a flag. docs/engines.md says what differs from train.py.
"""

import dataclasses
import sys
from typing import Callable, Sequence

from torch import Tensor

from advantage import shape_with_entropy
from plumbing.pretrained import Pretrained, end_tokens, open_pretrained
from plumbing.settings import PAPER_ALPHA, TEMPLATE_NAMES, flag
from tasks import Problem, load_task

# Where TRL's defaults are not the paper's method.
METHOD = dict(epsilon_high=0.28, lr_scheduler_type="constant")


@dataclasses.dataclass
class Settings:
    """Ours, beside TRL's."""

    model: str = flag("base", "model to start from: a folder or a hub id")
    task: str = flag("countdown", "as train.py's")
    data: str = flag("", "math: problems to train on")
    test_data: str = flag("", "math: problems that are kept out of the training")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    alpha: float = flag(PAPER_ALPHA["grpo"], "weight of the entropy in the entropy advantage")
    kappa: float = flag(2.0, "psi is at most |A| / kappa")


class EntropyAdvantage:
    """What a trainer of TRL needs for the entropy advantage:

        class Trainer(EntropyAdvantage, GRPOTrainer): ...

    TRL's loss asks for log-probabilities and entropy first, and reads the advantages after that:
    they are shaped in between. (TRL asks for an entropy only there; of the policy that sampled, and
    of a reference, it wants none.)"""

    alpha: float
    kappa: float

    def _compute_loss(self, model, inputs: dict) -> Tensor:
        # A copy, so that the next pass over the same answers does not shape what is shaped.
        self.batch = dict(inputs)
        return super()._compute_loss(model, self.batch)

    def _get_per_token_logps_and_entropies(self, *arguments, **options) -> tuple:
        logp, entropy, *rest = super()._get_per_token_logps_and_entropies(*arguments, **options)
        if entropy is not None:
            plain = self.batch["advantages"][:, None].expand_as(entropy)  # [B] -> [B, R]
            shaped = shape_with_entropy(plain, entropy, self.alpha, self.kappa)
            self.batch["advantages"] = shaped
        return logp, entropy, *rest


class OwnPrompts:
    """A trainer with this takes the ids of `task.encode`; TRL would tokenize text, with a second
    BOS where a template has one."""

    encoded: dict[str, list[int]]  # what the data set calls a prompt -> ids

    def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict]:
        return [self.encoded[prompt] for prompt in prompts], None, {}


def reward_of(
    task, problem_of: dict[str, Problem], pretrained: Pretrained
) -> Callable[..., list[float]]:
    """The task's rewards, as TRL asks for them."""
    ends = end_tokens(pretrained)

    def task_reward(prompts: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        problems = [problem_of[prompt] for prompt in prompts]
        finished = [ids[-1] in ends for ids in completion_ids]
        without_end = [ids[:-1] if done else ids for ids, done in zip(completion_ids, finished)]
        texts = pretrained.tokenizer.batch_decode(without_end)
        return task.rewards(problems, texts, finished)

    return task_reward


def make_trainer(s: Settings, config):
    """TRL's trainer; `config` is a GRPOConfig. ValueError and FileNotFoundError as in train.py."""
    from datasets import Dataset
    from trl import GRPOTrainer

    pretrained = open_pretrained(s.model)
    task = load_task(s.task, s.data, s.test_data, s.template)
    problem_of = {problem.prompt: problem for problem in [*task.train, *task.validation]}
    prompt_ids = {}
    for prompt, problem in problem_of.items():
        prompt_ids[prompt] = task.encode(problem, pretrained.tokenizer)

    class Trainer(EntropyAdvantage, OwnPrompts, GRPOTrainer):
        alpha = s.alpha
        kappa = s.kappa
        encoded = prompt_ids

    def rows(problems: Sequence[Problem]) -> Dataset:
        return Dataset.from_list([{"prompt": problem.prompt} for problem in problems])

    return Trainer(
        model=str(pretrained.folder),
        reward_funcs=reward_of(task, problem_of, pretrained),
        args=config,
        train_dataset=rows(task.train),
        eval_dataset=rows(task.validation) if config.eval_strategy != "no" else None,
        processing_class=pretrained.tokenizer,
    )


def parse(arguments: Sequence[str] | None = None) -> tuple:
    """-> (Settings, GRPOConfig). ImportError without TRL."""
    try:
        import datasets  # noqa: F401
        from trl import GRPOConfig, TrlParser
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install trl datasets") from None

    parser = TrlParser((Settings, GRPOConfig), description=__doc__)
    parser.set_defaults_with_config(**METHOD)
    return parser.parse_args_and_config(arguments)


def main() -> None:
    try:
        trainer = make_trainer(*parse())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.trl_grpo: {error}")
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    # Without this, one of several processes may abort at its end.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
