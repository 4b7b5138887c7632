"""Pixels -> vectors: families of frozen networks, the baselines, and what makes the vectors of one embedding what they are.

spec.py       EmbeddingSpec: the identity of an embedding, as pure data
records.py    what stage one made of each embedding, and how to make one's vectors again
loader.py     images of a data set, read and sent through embedders in batches
networks.py   the networks of a config: check, load, layers; families.py is the table of families
baselines.py  thumbnails and HOG
"""
