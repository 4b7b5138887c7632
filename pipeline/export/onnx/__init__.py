"""ONNX: one file from decoded images to the answers of `predict`.

    graph.py   Graph: nodes and constants under way to a model
    pixels.py  resize and crop, as `images.prepare` does them
    heads.py   fitted heads, their calibration and the answers of every target
    proof.py   what onnxruntime says of images beside what `predict` says

The network itself is written by torch, at `Backbone.to_onnx`.
"""
