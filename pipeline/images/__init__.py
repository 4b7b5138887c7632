"""Images: from a file's bytes to the input pixels of a network.

reading.py     safe reading of one file of a data set; images given in Python: paths, PIL images, arrays
archives.py    files inside zip, tar and Parquet
decoding.py    bytes -> RGB pixels by one documented policy; file formats, and the digests of contents
preparing.py   pixels -> the input of a network, or a perceptual hash
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
