"""Training a network end to end: stage three, which starts from a fitted head. Its result is one more backbone.

material.py    which embedding, head and images
handover.py    the network with stage two's head as its last layer
plan.py        which stages of a network are trained when, and how what stays is made cheap
batches.py     which images a step sees, augmentation, the loss
trainer.py     steps, evaluations, the choice of weights, the checkpoint
pilot.py       a few steps, for the advice
result.py      the way back to the hand-over, the weights file, the verdict
"""
