"""Training a network end to end: stage three, which starts from a fitted head.

plan.py         which stages of a network are trained when, BatchNorm's modes
batches.py      which images a step sees, augmentation, mixup
steps.py        one step, one evaluation, the optimizer and its rates
loop.py         train(): steps, evaluations, the choice of weights
return_path.py  the path back to the hand-over
checkpoint.py   what a killed run needs to go on
weights.py      copies of weights, and the result as `embed` loads it
handover.py     a scikit-learn head as the network's last layer
instruments.py  profiler, TensorBoard
material.py     which embedding, head and images
start.py        the network with stage two's head as its last layer
judgement.py    the comparisons and the verdict
"""

from pipeline.finetuning.batches import Data, Labelled
from pipeline.finetuning.checkpoint import Run, State
from pipeline.finetuning.handover import fold, put_head, random_layer
from pipeline.finetuning.loop import train
from pipeline.finetuning.plan import check_plan, describe_plan, stages_of
from pipeline.finetuning.return_path import ReturnPath, return_path
from pipeline.finetuning.steps import Task, evaluate, predict_logits, steps_for
from pipeline.finetuning.weights import Score, copy_weights, describe, write_weights

__all__ = [
    "Data",
    "Labelled",
    "ReturnPath",
    "Run",
    "Score",
    "State",
    "Task",
    "check_plan",
    "copy_weights",
    "describe",
    "describe_plan",
    "evaluate",
    "fold",
    "predict_logits",
    "put_head",
    "random_layer",
    "return_path",
    "stages_of",
    "steps_for",
    "train",
    "write_weights",
]
