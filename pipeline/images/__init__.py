"""Images: from a file's bytes to the pixels a network is given.

reading.py     one file of a data set, safely
decoding.py    bytes -> RGB pixels, by one documented policy
hashing.py     a perceptual hash, by which copies are found that were resized, compressed or cropped
preparing.py   the transform that belongs to the weights: resize and crop
"""

from pipeline.images.decoding import DECODE_POLICY, FORMATS, decode, policy_key
from pipeline.images.hashing import HASH_BYTES, HASH_IDENTITY, HASH_STORE, hash_distances, perceptual_hash
from pipeline.images.preparing import DECODE_MODES, MAX_RESIZED_PIXELS, Preprocessing, prepare
from pipeline.images.reading import ImageProblem, open_file

__all__ = [
    "DECODE_MODES",
    "DECODE_POLICY",
    "FORMATS",
    "HASH_BYTES",
    "HASH_IDENTITY",
    "HASH_STORE",
    "MAX_RESIZED_PIXELS",
    "ImageProblem",
    "Preprocessing",
    "decode",
    "hash_distances",
    "open_file",
    "perceptual_hash",
    "policy_key",
    "prepare",
]
