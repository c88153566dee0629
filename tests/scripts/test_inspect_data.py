import json
import re

import jaxsft


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_learned_tokens_stand_in_brackets_and_a_report_follows(run_here, rows, tmp_path, capsys):
    run_here("inspect_data", "--model.path", jaxsft.BASE, "--data.train", rows, "--out", str(tmp_path), "--show", "2")
    shown = capsys.readouterr().out
    assert "document 1 of 40" in shown
    assert "What is 0 plus 0?<|im_end|>↵" in shown
    assert "⟦It is 0.<|im_end|>⟧" in shown
    assert shown.count("⟦") == 2
    for name in ("trained tokens", "efficiency", "duplicate rows", "longest row", "read as", "alpaca"):
        assert name in shown, name
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_file_of_a_training_script_is_taken_as_it_is(run_here, rows, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    settings = {"model": {"path": jaxsft.BASE}, "data": {"train": rows, "val_fraction": 0.25}, "optim": {"clip": 0.5}}
    file.write_text(json.dumps(settings | {"train": {"epochs": 3}, "tuning": {"method": "full"}}), encoding="utf-8")
    run_here("inspect_data", "--config", str(file), "--out", str(tmp_path), "--show", "0")
    assert "held out" in capsys.readouterr().out


def test_a_character_of_several_tokens_is_shown_whole(run_here, tmp_path, capsys):
    file = lines(tmp_path / "a.jsonl", [{"instruction": "?", "output": "龘🙂"}])
    run_here("inspect_data", "--model.path", jaxsft.BASE, "--data.train", file, "--out", str(tmp_path))
    assert "⟦龘🙂<|im_end|>⟧" in capsys.readouterr().out


def test_preferences_show_the_prompt_once_both_answers_and_how_they_are_packed(run_here, tmp_path, capsys):
    file = lines(tmp_path / "a.jsonl", [{"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}] * 2)
    run_here("inspect_data", "--model.path", jaxsft.BASE, "--data.train", file, "--out", str(tmp_path), "--show", "1")
    shown = capsys.readouterr().out
    assert "⟦ Blue.<|im_end|>⟧" in shown
    assert "⟦ Green.<|im_end|>⟧" in shown
    assert shown.count("Sky") == 1
    assert "preference" in shown
    assert "the first of 1 rows of 2,048 tokens" in shown
    cells = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    prompt, chosen, rejected = (
        next(line for line in cells if name in line) for name in ("prompt", "chosen", "rejected")
    )
    assert prompt[:3] == ["1", "1", "prompt"]
    assert prompt[-1] == "0"
    assert chosen[:2] == ["2", "1"]
    assert rejected[:2] == ["3", "1"]
    assert chosen[3] == rejected[3] == str(int(prompt[-2]))  # they begin at the position behind it
    assert f"{2 * int(prompt[-2])} tokens not computed twice" in shown


def test_an_unpaired_answer_is_shown_beside_that_of_the_next_row(run_here, tmp_path, capsys):
    made = [
        {"prompt": prompt, "completion": f" {word}.", "label": word == "Blue"}
        for prompt, word in (("Sky?", "Blue"), ("Leaf?", "Green"), ("Rose?", "Red"))
    ]
    file = lines(tmp_path / "a.jsonl", made)
    run_here("inspect_data", "--model.path", jaxsft.BASE, "--data.train", file, "--out", str(tmp_path), "--show", "1")
    shown = capsys.readouterr().out
    assert "pair 1 of 3, chosen (label 1)" in shown
    assert "pair 1 of 3, another row's answer" in shown
    assert "⟦ Blue.<|im_end|>⟧" in shown
    assert "⟦ Green.<|im_end|>⟧" in shown
    assert "⟦ Red" not in shown


def test_images_are_counted_by_class_and_missing_files_are_named(run_here, tmp_path, capsys):
    (tmp_path / "here.png").write_bytes(b"")
    rows = [{"image_path": "here.png", "label": "a"}, {"image_path": "gone.png", "label": "b"}]
    run_here("inspect_data", "--data.train", lines(tmp_path / "a.jsonl", rows))
    out = capsys.readouterr().out
    shown = " ".join(out.split())
    assert "a │ 1" in shown
    assert "missing │ 1" in shown
    assert "gone.png" in re.sub(r"[\s│]", "", out)  # wherever the cell breaks the path
