"""Images: from a file's bytes to the pixels a network is given.

reading.py     one file of a data set, safely; images as Python code gives them: paths, PIL images, arrays
archives.py    files inside zip, tar and Parquet
formats.py     what a file is, by its first bytes, and what names its content
decoding.py    bytes -> RGB pixels, by one documented policy
preparing.py   what is made of pixels: the input of a network, and a perceptual hash
"""

from pipeline.images.archives import (
    ENDINGS,
    Refused,
    entries,
    forget,
    image_columns,
    inside,
    open_archive,
    opened,
    read_elsewhere,
)
from pipeline.images.decoding import DECODE_POLICY, NO_IMAGE, decode, policy_key
from pipeline.images.formats import START_BYTES, ImageProblem, content_key, kind_of
from pipeline.images.preparing import (
    DECODE_MODES,
    HASH_BYTES,
    HASH_IDENTITY,
    HASH_STORE,
    MAX_RESIZED_PIXELS,
    Preprocessing,
    hash_distances,
    perceptual_hash,
    prepare,
)
from pipeline.images.reading import Stat, open_file, read_steadily, stat_of
