"""Training: what is minimized, one step, and the loop.

Read `objectives` (the losses of the three models, and what a batch is), `step` (gradients, then the
optimizer, as one compiled program), `loop` (what is around it: resume, evaluation, curves).
`run` is the state that the loop works on; `batches` brings them to the device; `evaluation`
measures; `log` and `events` write figures down; `notices` are for
whoever watches; `interrupt` ends a run between two steps; `names` knows what arguments and arrays
are called elsewhere.
"""

from jaxformers.training.evaluation import MeanLoss, evaluate
from jaxformers.training.loop import fit
from jaxformers.training.objectives import (
    count_targets,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
)
from jaxformers.training.run import Report
from jaxformers.training.step import BadSteps, Training, train_step
