import json

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


def test_preferences_show_both_answers_and_what_padding_costs(run_here, tmp_path, capsys):
    file = lines(tmp_path / "a.jsonl", [{"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}] * 2)
    run_here("inspect_data", "--model.path", jaxsft.BASE, "--data.train", file, "--out", str(tmp_path), "--show", "1")
    shown = capsys.readouterr().out
    assert "⟦ Blue.<|im_end|>⟧" in shown
    assert "⟦ Green.<|im_end|>⟧" in shown
    assert "preference" in shown


def test_images_are_counted_by_class_and_missing_files_are_named(run_here, tmp_path, capsys):
    (tmp_path / "here.png").write_bytes(b"")
    rows = [{"image_path": "here.png", "label": "a"}, {"image_path": "gone.png", "label": "b"}]
    run_here("inspect_data", "--data.train", lines(tmp_path / "a.jsonl", rows))
    shown = " ".join(capsys.readouterr().out.split())
    assert "a │ 1" in shown
    assert "missing │ 1" in shown
    assert "gone" in shown
