"""Models and trainings in files.

`model_file` saves a model that can be loaded without being told what it is; `construction` is how
the file says so. `directory` keeps the last states of a training, `orbax_directory` those of one
that spans hosts, and `training_state` is what both take out of a training and put back.
"""

from jaxformers.checkpoint.directory import Checkpoints
from jaxformers.checkpoint.model_file import load, save
from jaxformers.checkpoint.orbax_directory import OrbaxCheckpoints
from jaxformers.checkpoint.training_state import digest
