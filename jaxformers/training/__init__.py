"""Training: the losses, one step, and the loop.

- `objectives` has the losses of the three models and says which arrays a batch has.
- `step` computes gradients and applies the optimizer, as one compiled program.
- `loop` adds resuming, evaluation and callbacks; `run` is the state that it works on, `reports` has
  what callbacks get.
- `batches` brings the batches to the device, and `row_order` orders their positions on a mesh.
- `evaluation` computes mean losses.
- `log` and `events` write figures to files, `notices` has the warnings of a running training.
- `interrupt` ends a run between two steps after a signal.
- `names` explains the names that other libraries have for arguments and arrays.
"""

from jaxformers.training.classification import classification_loss
from jaxformers.training.evaluation import MeanLoss, evaluate
from jaxformers.training.loop import fit
from jaxformers.training.objectives import (
    count_targets,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
)
from jaxformers.training.reports import Every, Figures, Report
from jaxformers.training.step import BadSteps, Training, train_step
