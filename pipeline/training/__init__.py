"""Training a network: one loop for stage three, which starts from a head, and for pretraining, which starts from nothing.

settings.py      what happens at which step, as pure functions
stages.py        the stages of a network, which of them are trained when, BatchNorm's modes
batches.py       which images a step sees, augmentation, mixup
replicas.py      gradients, from copies side by side where that is asked for
loop.py          train(): steps, evaluations, the choice of weights
checkpoint.py    what a killed run needs to go on
averages.py      moving average, soup, interpolation
search.py        the rate's range test; the path back to the hand-over
handover.py      a scikit-learn head as the network's last layer
instruments.py   dropout, profiler, TensorBoard
weights_file.py  the result, as `backbone` loads it
"""

from pipeline.training.batches import Labelled
from pipeline.training.checkpoint import Run, Score
from pipeline.training.handover import fold, put_head, random_layer
from pipeline.training.loop import Trained, evaluate, predict_logits, train
from pipeline.training.search import RangeTest, ReturnPath, range_test, return_path
from pipeline.training.settings import Settings, decide
from pipeline.training.stages import PlanStep, Stage, check_plan, describe_plan, stages_of
from pipeline.training.task import Data, Task
from pipeline.training.weights_file import describe, write_weights

__all__ = [
    "Data",
    "Labelled",
    "PlanStep",
    "RangeTest",
    "ReturnPath",
    "Run",
    "Score",
    "Settings",
    "Stage",
    "Task",
    "Trained",
    "check_plan",
    "decide",
    "describe",
    "describe_plan",
    "evaluate",
    "fold",
    "predict_logits",
    "put_head",
    "random_layer",
    "range_test",
    "return_path",
    "stages_of",
    "train",
    "write_weights",
]
