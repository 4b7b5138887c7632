"""Training a network end to end: stage three, which starts from a fitted head. Its result is a new backbone.

material.py    the embedding, head and images of a run
handover.py    the network with stage two's head as its last layer
plan.py        when each stage of a network is trained, and how frozen stages are made cheap
batches.py     the images of each step, augmentation, the loss
trainer.py     steps, evaluations, model selection, the checkpoint
pilot.py       a few trial steps, for the advice
result.py      interpolation towards the hand-over, the weights file, the verdict
"""
