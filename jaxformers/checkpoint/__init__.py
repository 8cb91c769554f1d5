"""Checkpoints of models and of trainings.

`model_file` saves a model, and `load` builds it again from the file alone. `construction` describes
objects in a file by their `names`, and `migration` reads the descriptions of earlier versions.
`directory` keeps the last states of a training, and `orbax_directory` those of a training on
several hosts. `training_state` copies the arrays and numbers out of a training and back into it.
`trained_model` describes the model of a training. `best` keeps the best model of a run.
"""

from jaxformers.checkpoint.best import KeepBest
from jaxformers.checkpoint.directory import Checkpoints
from jaxformers.checkpoint.load import load
from jaxformers.checkpoint.model_file import save
from jaxformers.checkpoint.orbax_directory import OrbaxCheckpoints
from jaxformers.checkpoint.training_state import digest
