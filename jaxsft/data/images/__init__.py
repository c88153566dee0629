"""Images with their classes: found in rows, folders and data sets, decoded to 8-bit RGB, streamed."""

from jaxsft.data.images.decode import decode
from jaxsft.data.images.labels import read as read_labels
from jaxsft.data.images.labels import save as save_labels
from jaxsft.data.images.load import Config, Loaded, Report, classes_of, load, sized, unlabelled
from jaxsft.data.images.pool import How, Pool
from jaxsft.data.images.sources import Found, Picture, files, find
from jaxsft.data.images.stream import ImageRows, batches

__all__ = [
    "Config",
    "Found",
    "How",
    "ImageRows",
    "Loaded",
    "Picture",
    "Pool",
    "Report",
    "batches",
    "classes_of",
    "decode",
    "files",
    "find",
    "load",
    "read_labels",
    "save_labels",
    "sized",
    "unlabelled",
]
