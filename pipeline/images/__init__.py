"""Images: from a file's bytes to the pixels a network is given.

reading.py     one file of a data set, safely
archives.py    files inside zip, tar and Parquet
contents.py    what names a content
kinds.py       what a file is, by its first bytes
decoding.py    bytes -> RGB pixels, by one documented policy; png.py and tiff.py: what Pillow takes otherwise than the file says
hashing.py     a perceptual hash, by which copies are found that were resized, compressed or cropped
given.py       images as Python code gives them: paths, PIL images, arrays
preparing.py   the transform that belongs to the weights: resize and crop
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
from pipeline.images.contents import content_key
from pipeline.images.decoding import DECODE_POLICY, NO_IMAGE, decode, policy_key
from pipeline.images.hashing import HASH_BYTES, HASH_IDENTITY, HASH_STORE, hash_distances, perceptual_hash
from pipeline.images.kinds import START_BYTES, Kind, kind_of
from pipeline.images.preparing import DECODE_MODES, MAX_RESIZED_PIXELS, Preprocessing, prepare
from pipeline.images.reading import ImageProblem, Stat, open_file, read_steadily, stat_of
