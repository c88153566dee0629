import json

import pytest

from jaxsft import run
from jaxsft.run import Config, Log, RunError, read_metrics


def config(folder, **options):
    return Config(output_dir=str(folder), **options)


@pytest.fixture
def used(tmp_path):
    """A folder that holds a run."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    return tmp_path


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert run.start(config(tmp_path / "a" / "b")).is_dir()


def test_a_folder_without_a_run_is_used_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run.start(config(tmp_path))
    run.start(config(tmp_path, overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoints"])
def test_a_folder_that_holds_another_run_is_refused_with_the_three_ways_out(tmp_path, what):
    (tmp_path / what).mkdir()
    with pytest.raises(RunError, match=r"holds another run; .*--run.resume true, .*--run.overwrite true, or choose"):
        run.start(config(tmp_path))


def test_overwrite_deletes_the_former_run(used):
    run.start(config(used, overwrite=True))
    assert list(used.iterdir()) == []


def test_overwrite_deletes_nothing_that_a_run_does_not_write(used):
    (used / "thesis.txt").write_text("mine")
    run.start(config(used, overwrite=True))
    assert [p.name for p in used.iterdir()] == ["thesis.txt"]


def test_every_process_may_overwrite(used, monkeypatch):
    """The first one deletes; the others find the folder as it was, and wait."""
    monkeypatch.setattr("jax.process_index", lambda: 1)
    run.start(config(used, overwrite=True))
    assert (used / "checkpoints").exists()


def test_resume_keeps_the_former_run_even_with_overwrite(used):
    before = sorted(p.name for p in used.iterdir())
    run.start(config(used, resume=True, overwrite=True))
    assert sorted(p.name for p in used.iterdir()) == before


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="out is a file; choose a folder"):
        run.start(config(tmp_path / "out"))


def test_every_step_is_a_line_and_the_speed_counts_tokens_over_time(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    log = Log(tmp_path)
    for step in (1, 2, 3):
        log.train(step, {"loss": 1.5 / step}, tokens=100)
    log.evaluation(3, {"loss": 0.25})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.5, "tokens_per_second": 0.0},
        {"step": 2, "loss": 0.75, "tokens_per_second": 50.0},
        {"step": 3, "loss": 0.5, "tokens_per_second": 66.7},
        {"step": 3, "eval_loss": 0.25},
    ]


def test_a_step_that_is_not_to_be_written_writes_nothing(tmp_path):
    log = Log(tmp_path)
    log.train(1, {"loss": 1.0}, 5, write=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_bar_runs_and_the_file_is_written_inside_it(tmp_path, capsys):
    log = Log(tmp_path)
    with log.progress(2):
        log.train(1, {"loss": 1.0}, 5)
        log.train(2, {"loss": 0.5}, 5)
    assert "2/2" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_resuming_drops_the_lines_of_later_steps(tmp_path):
    rows = [{"step": 0, "eval_loss": 3.0}, *({"step": s, "loss": float(s)} for s in range(1, 8))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = Log(tmp_path, step=5)
    assert lines(tmp_path) == rows[:6]
    log.train(6, {"loss": 6.5}, 1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_from_step_zero_begins_an_empty_file(used):
    Log(used)
    assert lines(used) == []


def test_a_partial_last_line_is_dropped_also_when_the_run_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    Log(tmp_path, step=2).train(3, {"loss": 1.0}, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_corrupt_line_in_the_middle_is_an_error(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}' + end)
    with pytest.raises(RunError, match=r"metrics.jsonl line 2 is not JSON; restore it"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_no_metrics_file_reads_as_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_an_unknown_error_keeps_its_traceback():
    def main():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run.guard(main)


def test_guard_shows_our_errors_as_a_message_and_others_whole(capsys):
    def ours():
        run.start(run.Config(output_dir=__file__))

    with pytest.raises(SystemExit) as stopped:
        run.guard(ours)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("\nerror: run.output_dir")
    with pytest.raises(ValueError, match="invalid literal"):
        run.guard(lambda: int("x"))
