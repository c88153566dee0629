"""jaxsft: fine-tune Hugging Face checkpoints in JAX, from a laptop CPU to a TPU pod.

The public names, listed by hand; what is not listed may change. None of them needs a configuration object.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsft import lora, losses, models, quant, rewards, score, tree
    from jaxsft.hub import export, export_adapter, load, load_adapter, load_variables, merge
    from jaxsft.lora import LoRA
    from jaxsft.models import Model
    from jaxsft.objectives import supervised
    from jaxsft.sample import generate, stream
    from jaxsft.train import make_step
    from jaxsft.types import State, Sums, Tokens

__version__ = "0.1.0"

BASE = str(Path(__file__).parent / "assets" / "base")  # the model that ships with the package

# Where each public name lives: imported when it is first used, so that `import jaxsft` stays light.
_HOME = {
    "tree": "jaxsft.tree",
    "lora": "jaxsft.lora",
    "losses": "jaxsft.losses",
    "models": "jaxsft.models",
    "quant": "jaxsft.quant",
    "rewards": "jaxsft.rewards",
    "score": "jaxsft.score",
    "LoRA": "jaxsft.lora",
    "Model": "jaxsft.models",
    "Tokens": "jaxsft.types",
    "Sums": "jaxsft.types",
    "State": "jaxsft.types",
    "supervised": "jaxsft.objectives",
    "make_step": "jaxsft.train",
    "load": "jaxsft.hub",
    "load_variables": "jaxsft.hub",
    "export": "jaxsft.hub",
    "merge": "jaxsft.hub",
    "load_adapter": "jaxsft.hub",
    "export_adapter": "jaxsft.hub",
    "generate": "jaxsft.sample",
    "stream": "jaxsft.sample",
}

__all__ = [
    "BASE",
    "LoRA",
    "Model",
    "State",
    "Sums",
    "Tokens",
    "export",
    "export_adapter",
    "generate",
    "load",
    "load_adapter",
    "load_variables",
    "lora",
    "losses",
    "make_step",
    "merge",
    "models",
    "quant",
    "rewards",
    "score",
    "stream",
    "supervised",
    "tree",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxsft' has no public name {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name] == f"jaxsft.{name}" else getattr(module, name)
