"""Images: from a file's bytes to the pixels a network is given.

reading.py     one file of a data set, safely; images as Python code gives them: paths, PIL images, arrays
archives.py    files inside zip, tar and Parquet
decoding.py    bytes -> RGB pixels, by one documented policy: what a file is, and what names its content
preparing.py   what is made of pixels: the input of a network, and a perceptual hash
"""

from pipeline.images.archives import (
    Refused,
    entries,
    forget,
    image_columns,
    inside,
    open_archive,
    opened,
    read_elsewhere,
)
from pipeline.images.decoding import (
    DECODE_POLICY,
    NO_IMAGE,
    START_BYTES,
    ImageProblem,
    content_key,
    decode,
    kind_of,
    policy_key,
)
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
