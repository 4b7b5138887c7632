"""Pixels -> vectors: networks and baselines, and what makes the vectors of one embedding what they are.

    spec.py        EmbeddingSpec: the identity of an embedding, as pure data; Embedder: what makes its vectors
    records.py     what stage one made of each embedding, where its store is, how to make its vectors again, several side by side
    transformer.py images to vectors as a transformer of scikit-learn's
    loader.py      images of a data set, read and sent through embedders in batches
    backbone.py    Backbone: a network on its device, uint8 pixels -> float32 vectors
    baselines.py   thumbnails, HOG, and vectors that were made elsewhere
    published.py   what a family publishes: networks, weights, licences; what pip installs, and what stands in for it
    weights.py     the table of families; what a config section asks for -> a network with its weights and their transform
    graph.py       the network's graph: nodes, shapes, the default layer, stages, pooling
    engines.py     device, number format, and torch or OpenVINO

torch is imported by backbone, weights, graph and the families, which are imported when a network is asked for: a run with
nothing to do never pays for it.
"""
