"""The sections of a run's configuration, each defined in the file that it configures; a script composes them."""

from jaxsft.augment import Config as Augment
from jaxsft.data import Config as Data
from jaxsft.data.images import Config as Images
from jaxsft.hub import Config as Model
from jaxsft.hub import ExportConfig as Export
from jaxsft.objectives import GRPO, PPO, Reward
from jaxsft.objectives import Config as Preference
from jaxsft.optim import Config as Optim
from jaxsft.rewards import Config as Rewards
from jaxsft.run import Config as Run
from jaxsft.sample import Config as Sample
from jaxsft.sharding import Config as Mesh
from jaxsft.train import Config as Train
from jaxsft.train import Pretraining
from jaxsft.tuning import Config as Tuning

__all__ = [
    "GRPO",
    "PPO",
    "Augment",
    "Data",
    "Export",
    "Images",
    "Mesh",
    "Model",
    "Optim",
    "Preference",
    "Pretraining",
    "Reward",
    "Rewards",
    "Run",
    "Sample",
    "Train",
    "Tuning",
]
