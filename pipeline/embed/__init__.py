"""Pixels -> vectors: networks, baselines, and the identity of each embedding.

    spec.py        EmbeddingSpec: the identity of an embedding, as pure data
    records.py     the embeddings of an experiment: their stores, how to recompute their vectors, concatenation
    transformer.py Embedder: images to vectors as a scikit-learn transformer
    loader.py      reads the images of a data set and runs them through embedders in batches
    backbone.py    Backbone: a network on its device, uint8 pixels -> float32 vectors
    baselines.py   thumbnails, HOG, and precomputed vectors
    published.py   families: their networks, weights and licences; weights installed by pip, and their substitute
    weights.py     the table of families; config section -> network with its weights and their transform
    graph.py       the network's graph: nodes, shapes, the default layer, stages, pooling
    engines.py     device, number format, and torch or OpenVINO

torch is imported by backbone, weights, graph and the families, which are imported only when a network is needed: a run with
nothing to do never imports it.
"""
