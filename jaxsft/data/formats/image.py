"""Images with a class: the path of a picture, from the folder of the row's file on, and its label."""

from typing import Any

from jaxsft.data.chat import Image
from jaxsft.data.formats.turns import show, string
from jaxsft.data.rows import DataError

COLUMNS = ("image_path", "label")


def parse(fields: dict[str, Any]) -> Image:
    """Takes path and label; a label that is a number is named by it.

    Raises:
      DataError: the path is no string or empty, or the label neither a string nor a whole number.

    Example:
      >>> parse({"image_path": "path/image1.jpg", "label": "eg1"})
      Image(path='path/image1.jpg', label='eg1')
    """
    path, label = string(fields, "image_path"), fields["label"]
    if not path:
        raise DataError('image_path is ""; give the path of a picture')
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"label is {show(label)}; expected a string or a whole number")
    return Image(path, str(label))
