"""Few examples: how well classes are learned from a handful of labelled images each, on stored features.

    episodes.py  the draw: N classes, K images of each to learn from, others to be judged by
    methods.py   what learns from K images: prototypes, neighbours, logistic regression; one row each
    maml.py      meta-learning: the part that is learned on other classes first
    result.py    scores with intervals over episodes, the comparison with logistic regression, in words and on disk

Protocol: Vinyals et al. 2016 (episodes), Snell et al. 2017 (nearest centroid), Finn et al. 2017 and Raghu et al. 2020 (MAML with
the inner loop on the head alone), Chen et al. 2019 (what it is to be compared with), Wang et al. 2019 (centred, normalised features).
"""

from pipeline.evaluation.fewshot.episodes import Images, Plan
from pipeline.evaluation.fewshot.measure import measure
from pipeline.evaluation.fewshot.result import FewShot, Point, points_of, read, write

__all__ = ["FewShot", "Images", "Plan", "Point", "measure", "points_of", "read", "write"]
