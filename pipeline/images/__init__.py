"""Images: from a file's bytes to the pixels a network is given.

reading.py     one file of a data set, safely
decoding.py    bytes -> RGB pixels, by one documented policy
preparing.py   the transform that belongs to the weights: resize and crop
"""

from pipeline.images.decoding import DECODE_POLICY, FORMATS, decode, policy_key
from pipeline.images.preparing import DECODE_MODES, MAX_RESIZED_PIXELS, Preprocessing, prepare
from pipeline.images.reading import ImageProblem, open_file

__all__ = [
    "DECODE_MODES",
    "DECODE_POLICY",
    "FORMATS",
    "MAX_RESIZED_PIXELS",
    "ImageProblem",
    "Preprocessing",
    "decode",
    "open_file",
    "policy_key",
    "prepare",
]
