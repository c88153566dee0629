import json

import pytest

from jaxsft import predictions
from jaxsft.predictions import FILE, Prediction
from jaxsft.run import RunError

ROWS = [Prediction(f"问 {i}?", f"answer {i}", "") for i in range(4)]


def test_rows_have_the_keys_that_llamafactory_writes(tmp_path):
    predictions.append(tmp_path, ROWS[:1])
    predictions.append(tmp_path, ROWS[1:])
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"prompt": "问 0?", "predict": "answer 0", "label": ""}
    assert "问" in lines[0]
    assert predictions.read(tmp_path) == ROWS


def test_what_a_kill_cut_short_is_taken_out(tmp_path):
    assert predictions.read(tmp_path) == []
    predictions.keep(tmp_path, 0)
    assert not (tmp_path / FILE).exists()
    predictions.append(tmp_path, ROWS)
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "half')
    assert predictions.read(tmp_path) == ROWS
    predictions.keep(tmp_path, 2)
    predictions.append(tmp_path, ROWS[2:3])
    assert predictions.read(tmp_path) == ROWS[:3]


def test_answers_of_other_settings_are_not_continued(tmp_path):
    predictions.settle(tmp_path, {"samples": 1})
    predictions.settle(tmp_path, {"samples": 2})  # nothing was answered yet
    predictions.append(tmp_path, ROWS)
    predictions.settle(tmp_path, {"samples": 2})
    with pytest.raises(RunError, match=r"were written with samples 2, and now it is 3; give the same, or --run.overw"):
        predictions.settle(tmp_path, {"samples": 3})
