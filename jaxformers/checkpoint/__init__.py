"""Models and trainings in files.

`model_file` saves a model that `load` makes again without being told what it is. `construction` is
how a file says so, by the `names` of objects, and `migration` is what earlier versions said.
`directory` keeps the last states of a training, `orbax_directory` those of one that spans hosts.
`training_state` is what both take out of a training and put back, and `trained_model` how the model
in it is built. `best` keeps the best model of a run.
"""

from jaxformers.checkpoint.best import KeepBest
from jaxformers.checkpoint.directory import Checkpoints
from jaxformers.checkpoint.load import load
from jaxformers.checkpoint.model_file import save
from jaxformers.checkpoint.orbax_directory import OrbaxCheckpoints
from jaxformers.checkpoint.training_state import digest
