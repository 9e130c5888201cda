"""What the study compares: every arm is a setting of train.py, and a row of one of four lists.

CORE and OTHERS are measured on the test problems, MAP only on the validation problems. FRESH came
when CORE and MAP were known; lab/RESULTS.md says what was fixed for it, and when.
"""

from dataclasses import dataclass

GRPO = "GRPO"
GRPO_ENTROPY = "GRPO + entropy advantage"
PPO = "PPO"
PPO_ENTROPY = "PPO + entropy advantage"


@dataclass(frozen=True)
class Arm:
    name: str  # as in the tables; `key` makes its file name
    flags: str = ""  # what train.py is told beside the seed; its defaults are GRPO_ENTROPY
    against: str = ""  # the arm that it is compared with; "": it is itself a baseline
    first_seed: int = 0


BASE = Arm("base")  # not trained, only measured

CORE = [
    Arm(GRPO, "--alpha 0"),
    Arm(GRPO_ENTROPY, "", GRPO),
]

OTHERS = [
    # 0.003 is the best of the three coefficients in MAP.
    Arm("GRPO + entropy regularisation", "--alpha 0 --entropy-coef 0.003", GRPO),
    Arm("GRPO without clip-higher", "--alpha 0 --clip-high 0.2", GRPO),
    Arm(PPO, "--algo ppo --alpha 0"),
    Arm(PPO_ENTROPY, "--algo ppo", PPO),
]

MAP = [
    Arm("beta 0.003", "--alpha 0 --entropy-coef 0.003", GRPO),
    Arm("beta 0.01", "--alpha 0 --entropy-coef 0.01", GRPO),
    Arm("beta 0.03", "--alpha 0 --entropy-coef 0.03", GRPO),
    Arm("alpha 1", "--alpha 1", GRPO),
    Arm("alpha 2", "--alpha 2", GRPO),
    Arm("kappa 1.5", "--kappa 1.5", GRPO),
    Arm("kappa 4", "--kappa 4", GRPO),
    # Where the setting changes GRPO too, it has a baseline of its own.
    Arm("steps x 3", "--steps 300 --alpha 0"),
    Arm("steps x 3 + entropy advantage", "--steps 300", "steps x 3"),
    Arm("lr 1e-4, minibatch 2", "--lr 1e-4 --minibatch 2 --alpha 0"),
    Arm(
        "lr 1e-4, minibatch 2 + entropy advantage",
        "--lr 1e-4 --minibatch 2",
        "lr 1e-4, minibatch 2",
    ),
    Arm("hard", "--task countdown-hard --alpha 0"),
    Arm("hard + entropy advantage", "--task countdown-hard", "hard"),
    Arm("easy", "--task countdown-easy --alpha 0"),
    Arm("easy + entropy advantage", "--task countdown-easy", "easy"),
]

FRESH = [
    Arm("fresh GRPO", "--alpha 0", first_seed=5),
    Arm("fresh GRPO + entropy advantage", "", "fresh GRPO", first_seed=5),
    Arm("fresh kappa 4", "--kappa 4", "fresh GRPO", first_seed=5),
    Arm("fresh hard", "--task countdown-hard --alpha 0", first_seed=5),
    Arm("fresh hard + entropy advantage", "--task countdown-hard", "fresh hard", first_seed=5),
    Arm("repeated hard", "--task countdown-hard --alpha 0"),
    Arm("repeated hard + entropy advantage", "--task countdown-hard", "repeated hard"),
]

ARMS = [*CORE, *OTHERS, *MAP, *FRESH]


def key(name: str, *seed: int) -> str:
    """The name of a run's folder and of its saved counts: "PPO + entropy advantage", 2 ->
    "ppo-entropy-advantage-2". Without a seed it is what --arms calls the arm."""
    words = name.lower().replace(" + ", " ").replace(",", "").split(" ")
    return "-".join([*words, *map(str, seed)])
