"""Where images come from: files of rows, folders of classes, data sets with a column of images.

    rows.jsonl                {"image_path": "photos/1.jpg", "label": "rose"}; paths start at the folder of the file
    flowers/rose/1.jpg        a folder of folders, one for each class
    flowers.parquet, org/name a data set whose column of images holds the files themselves, and whose labels may be
                              numbers with names

Nothing is decoded here. A row that cannot be used comes out as `Bad`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.data import formats, sources
from jaxsft.data.chat import Image
from jaxsft.data.info import Source, adapt
from jaxsft.data.rows import Bad, DataError

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
IMAGES, LABELS = ("image", "img", "picture"), ("label", "labels", "class")  # usual names of columns


class Picture(NamedTuple):
    """A picture and its class, undecoded: a file, or a cell of a table."""

    place: str  # "rows.jsonl line 3 (photos/1.jpg)", "flowers/rose/1.jpg"
    label: str
    path: str = ""
    table: int = -1
    row: int = -1


class Found(NamedTuple):
    """Pictures, rows that are none, and the tables that some of them lie in."""

    pictures: list[Picture]
    bad: list[Bad]
    tables: list[Any]  # of the package datasets, with one column of {"bytes", "path"}


def find(paths: list[str], columns: Mapping[str, str] | None = None) -> Found:
    """Finds the pictures of some paths, one path after the other.

    Args:
      paths: each a file of rows, a folder, a glob, or a data set of the hub.
      columns: ours: theirs, for columns that are not called image_path (or image) and label.

    Raises:
      DataError: a path is nothing that can be read, or has no pictures.

    Example:
      >>> find(["jaxsft/assets/text"])
      Traceback (most recent call last):
      jaxsft.data.rows.DataError: jaxsft/assets/text has no row with an image; the first: ...
    """
    found = Found([], [], [])
    for path in paths:
        before, spoilt = len(found.pictures), len(found.bad)
        if (table := _table(path, columns or {})) is not None:
            _add_table(found, table, path, columns or {})
        elif folders := class_folders(path):
            _add_folders(found, folders)
        else:
            _add_rows(found, path, columns)
        if len(found.pictures) == before:
            more = f"; the first: {found.bad[spoilt]}" if len(found.bad) > spoilt else ""
            raise DataError(f"{path} has no row with an image{more}")
    return found


def class_folders(path: str) -> list[Path]:
    """The folders of a folder in which there are pictures, by name; none where it is something else.

    Raises:
      DataError: the folder cannot be read, or its folders hold folders of pictures, as train/ and test/ do.

    Example:
      >>> class_folders("jaxsft/assets")
      []
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return []
    inside = [one for one in _listed(folder) if one.is_dir()]
    with_pictures = [one for one in inside if any(map(_is_picture, _listed(one)))]
    deeper = [
        one for one in inside if any(two.is_dir() and any(map(_is_picture, _listed(two))) for two in _listed(one))
    ]
    if deeper and not with_pictures:
        names = ", ".join(one.name for one in deeper[:4])
        raise DataError(f"{path} holds folders of folders with pictures ({names}); give one, as {deeper[0]}")
    return with_pictures


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read ({error.strerror})") from error


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS


def files(paths: list[str]) -> list[Picture]:
    """The pictures of files and folders, without a class; a file is one whatever it is called.

    Raises:
      DataError: a path is not there, or a folder has no pictures.

    Example:
      >>> files(["no such.jpg"])
      Traceback (most recent call last):
      jaxsft.data.rows.DataError: 'no such.jpg' is no file and no folder
    """
    found = Found([], [], [])
    for path in paths:
        at, before = Path(path).expanduser(), len(found.pictures)
        if at.is_dir():
            _add_folders(found, [at])
        elif at.exists():
            found.pictures.append(Picture(path, "", str(at)))
        else:
            raise DataError(f"{path!r} is no file and no folder")
        if len(found.pictures) == before:
            raise DataError(f"the folder {path} has no pictures; they end with {', '.join(sorted(ENDINGS))}")
    return [one._replace(label="") for one in found.pictures]


def _add_folders(found: Found, folders: list[Path]) -> None:
    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read ({error.strerror})") from error

    for folder in folders:
        for at, inside, files in os.walk(folder, onerror=refuse):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            kept = sorted(name for name in files if _is_picture(Path(name)) and not name.startswith("."))
            paths = [os.path.join(at, name) for name in kept]
            found.pictures.extend(Picture(path, folder.name, path) for path in paths)


def _add_rows(found: Found, path: str, columns: Mapping[str, str] | None) -> None:
    source = Source(path, "image", columns=dict(columns) if columns else None)
    for row in sources.scan(path):
        if isinstance(row, Bad):
            found.bad.append(row)
            continue
        try:
            _, image = formats.parse(adapt(row.fields, source), "image", row.folder)
        except DataError as error:
            found.bad.append(Bad(row.place, str(error)))
        else:
            assert isinstance(image, Image)
            found.pictures.append(Picture(f"{row.place} ({image.path})", image.label, image.path))


# ---- data sets with a column of images ------------------------------------------------------------------------------


def _table(path: str, columns: Mapping[str, str]) -> Any | None:
    """The data set of a path, where it has a column of images."""
    import datasets

    at = Path(path).expanduser()
    try:
        if at.is_dir() and (at / "dataset_dict.json").is_file():
            inside = ", ".join(str(one) for one in _listed(at) if one.is_dir())
            raise DataError(f"{path} holds several splits; give one: {inside}")
        if at.is_dir() and (at / "state.json").is_file():
            table = datasets.load_from_disk(str(at))
        elif at.is_file() and at.suffix == ".parquet":
            table = datasets.Dataset.from_parquet(str(at), cache_dir=_cache())  # type: ignore[arg-type]
        elif at.is_file() and at.suffix == ".arrow":
            table = datasets.Dataset.from_file(str(at))
        elif at.exists() or sources.files(path):
            return None
        else:
            table = sources.load_hub(path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a data set ({' '.join(str(error).split())[:200]})") from error
    return table if _image_column(table, columns) else None


def _cache() -> str | None:
    """Where the copy of a parquet file goes that can be read row by row; by default the package's own place."""
    return os.environ.get("JAXSFT_CACHE")


def _image_column(table: Any, columns: Mapping[str, str]) -> str | None:
    import datasets

    wanted = columns.get("image") or columns.get("image_path")
    holds = lambda kind: isinstance(kind, datasets.Image) or (isinstance(kind, dict) and {"bytes", "path"} <= set(kind))
    those = [name for name, kind in table.features.items() if holds(kind)]
    usual = [name for name in those if name in IMAGES]
    return next((name for name in [wanted, *usual, *those] if name in those), None)


def _add_table(found: Found, table: Any, path: str, columns: Mapping[str, str]) -> None:
    import datasets

    pixels, named = _image_column(table, columns), columns.get("label")
    classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [name for name in LABELS if name in table.features]
    labels = next((name for name in [named, *usual, *classes] if name in table.features), None)
    if labels is None or named not in (None, labels):
        raise DataError(
            f"{path} has no column {named or 'label'!r}; it has {', '.join(table.features)}. Name it with "
            "data.columns, as {label: fine_label}"
        )
    kind = table.features[labels]
    values = table[labels][:]
    if isinstance(kind, datasets.ClassLabel):
        values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
    number = len(found.tables)
    found.tables.append(table.select_columns([pixels]).cast_column(pixels, datasets.Image(decode=False)))
    for row, value in enumerate(values):
        place = f"{path} row {row + 1}"
        if isinstance(value, bool) or not isinstance(value, str | int):
            found.bad.append(Bad(place, f"label is {value!r}; expected a string or a whole number"))
        else:
            found.pictures.append(Picture(place, str(value), "", number, row))


def content(picture: Picture, tables: list[Any]) -> str | bytes:
    """What `decode` takes of a picture: the path of its file, or the file itself.

    Raises:
      DataError: the cell is empty.
    """
    if picture.table < 0:
        return picture.path
    (cell,) = tables[picture.table][picture.row].values()
    if cell and cell["bytes"] is not None:
        return cell["bytes"]
    if cell and cell["path"]:
        return cell["path"]
    raise DataError("the cell of the image is empty")
