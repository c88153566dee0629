import pytest

from jaxsft.data import DataError, Image, parse
from jaxsft.data.formats import image


@pytest.mark.parametrize(("label", "name"), [("eg1", "eg1"), (3, "3"), (0, "0"), ("", "")])
def test_a_label_is_a_name_or_a_number(label, name):
    assert image.parse({"image_path": "path/image1.jpg", "label": label}) == Image("path/image1.jpg", name)


@pytest.mark.parametrize(("path", "found"), [("a/b.jpg", "/data/a/b.jpg"), ("/else/b.jpg", "/else/b.jpg")])
def test_a_path_starts_from_the_folder_of_its_file(path, found):
    assert parse({"image_path": path, "label": "x"}, "auto", "/data")[1].path == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_path": "", "label": "x"}, 'image_path is ""; give the path of a picture'),
        ({"image_path": 3, "label": "x"}, "image_path is 3; expected a string"),
        ({"image_path": "a.jpg", "label": True}, "label is True; expected a string or a whole number"),
        ({"image_path": "a.jpg", "label": 0.5}, "label is 0.5; expected a string or a whole number"),
        ({"image_path": "a.jpg", "label": ["x"]}, "label is .*; expected a string or a whole number"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        image.parse(fields)
