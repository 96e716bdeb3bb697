"""ACECode: a code model is trained by what happens when its programs are run, so that they become right and fast together.

    with Workers("cpu_seconds") as workers:
        executor = Executor(workers, [Problem("sum", "f", reference, tests=[(3,), (7,)], timed=[(10**5,)])])
        score = reward_function(executor)              # as trl's GRPOTrainer calls it: score(completions, task=[...])
        best_of(executor, "sum", completions)          # the same reward, to choose one of N samples
        # from assay.methods.code.acecode.training import PPO, Critic, climb
    climb(policy, prompts, of_tokens, end=2, critic=Critic(policy), settings=PPO(rounds=100, lr=1e-5)).policy

After "ACECode: A Reinforcement Learning Framework for Aligning Code Efficiency and Correctness in Code Language Models" (arXiv 2412.17264).
A program is run in the sandbox, judged outside of it, and its time is taken relative to a reference solution; a step function makes one
number of how it ended, of how many tests it passes and of how fast it is; PPO climbs that number. Nothing is run at inference.

The constants of the paper's reward are not public: those of `Reward` are our choice, in the order that the paper describes. Figures that
come of it are assay's. `climb`, in the module `training`, is PPO where it is given a critic and GRPO where it is not; `rejection` is the
cheap rival that a policy gradient has to beat at as many executions. Both train whole small models in plain torch: for a large one
give `reward_function` to a trainer that was made for it.

When NOT to use it: without inputs that are large enough to tell fast from slow (the reward becomes right or wrong only), without an
executor, or where sampling a few programs and running them at inference is affordable: `best_of` needs no training.
"""

from __future__ import annotations

from assay.methods.code.acecode.execution import Executor, Problem, best_of, normalised, program_in, reward_function
from assay.methods.code.acecode.metrics import ecc, faster_share, get, pass_at_1
from assay.methods.code.acecode.policy import Rollouts, token_logprobs, write
from assay.methods.code.acecode.reward import Executed, Reward

__all__ = [
    "Executed",
    "Executor",
    "Problem",
    "Reward",
    "Rollouts",
    "best_of",
    "ecc",
    "faster_share",
    "get",
    "normalised",
    "pass_at_1",
    "program_in",
    "reward_function",
    "token_logprobs",
    "write",
]
