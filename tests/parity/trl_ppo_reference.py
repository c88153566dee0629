"""Numbers of TRL's PPO, to compare ours against. TRL 1.16 has no PPO any more, so they are made once, with TRL 1.10.

    python3.11 -m venv ppo
    ppo/bin/pip install trl==1.10.0 torch
    ppo/bin/python tests/parity/trl_ppo_reference.py --out tests/parity/trl_ppo.json

All of PPO stands in PPOTrainer.train. Two stretches of its source run here as they are: the one from the rollout's
log-probabilities to whitened advantages, and the one from what policy and value model say in an update to the loss.
What is above `main` needs numpy alone: tests import `draw` and CASES to give ours the same.
"""

import argparse
import inspect
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

N, T = 5, 7
ROLLOUT = ("# be very careful with `padding_mask_p1`", "advantages = torch.masked_fill(advantages, padding_mask, 0)")
UPDATE = ("new_logprobs = torch.masked_fill(", "loss = pg_loss + args.vf_coef * vf_loss")
DEFAULTS = {
    "kl_estimator": "k1",
    "kl_coef": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "full": False,  # every answer as long as can be
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.5},
    "discounted": {"gamma": 0.9, "lam": 0.5},
    "whitened rewards": {"whiten_rewards": True},
    "narrow": {"cliprange": 0.05, "cliprange_value": 0.05, "vf_coef": 1.0},
    "full answers": {"full": True},
}


def draw(full: bool) -> dict[str, np.ndarray]:
    """A rollout of N answers of at most T tokens, and what policy and value model say of it in an update."""
    random = np.random.default_rng(0)
    arrays = {"logprobs": -random.exponential(size=(N, T)), "values": random.normal(size=(N, T))}
    arrays["ref_logprobs"] = arrays["logprobs"] + random.normal(scale=0.5, size=(N, T))
    arrays["new_logprobs"] = arrays["logprobs"] + random.normal(scale=0.2, size=(N, T))
    arrays["vpred"] = arrays["values"] + random.normal(scale=0.3, size=(N, T))
    arrays["scores"] = random.normal(size=N)
    lengths = np.full(N, T) if full else np.array([1, 3, T - 1, T, 4])
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"lengths": lengths}


def stretch(source: str, ends: tuple[str, str]) -> str:
    """The lines of `source` from the one that begins like the first of `ends` to the one that is the second."""
    lines = source.splitlines()
    first, last = (next(i for i, x in enumerate(lines) if x.strip().startswith(end)) for end in ends)
    return textwrap.dedent("\n".join(lines[first : last + 1]))


def compute(options: dict[str, Any]) -> dict[str, Any]:
    """What TRL makes of a rollout: rewards, advantages, returns, both losses, and the gradients of the loss."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    options = DEFAULTS | options
    given = {name: torch.tensor(x) for name, x in draw(options["full"]).items()}
    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    args = SimpleNamespace(**options)
    new_logprobs, vpred = given.pop("new_logprobs").requires_grad_(), given.pop("vpred").requires_grad_()
    lines = vars(ppo_trainer) | given | {"args": args, "sequence_lengths": given["lengths"] - 1}
    lines |= {"responses": torch.zeros(N, T).long()}
    exec(stretch(source, ROLLOUT), lines)
    every = torch.arange(N)
    behind = torch.zeros(N, 1)  # a state more than there are tokens, which TRL leaves out
    update = lines | {"micro_batch_inds": every, "context_length": 1, "new_logprobs": new_logprobs}
    update |= {"vpred_temp": torch.cat([vpred, behind], dim=1)[..., None]}
    update |= {"mb_return": lines["returns"], "mb_advantage": lines["advantages"]}
    update |= {"mb_values": lines["values"], "mb_logprobs": lines["logprobs"]}
    exec(stretch(source, UPDATE), update)
    update["loss"].backward()
    found = {name: lines[name] for name in ("rewards", "advantages", "returns")}
    found |= {name: update[name] for name in ("pg_loss", "vf_loss", "vf_clipfrac", "loss")}
    found |= {"pg_gradient": new_logprobs.grad, "vf_gradient": vpred.grad}
    return {name: x.tolist() for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines = [f"{json.dumps(name)}: {json.dumps(compute(options))}" for name, options in CASES.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
