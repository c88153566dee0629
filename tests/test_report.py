import json
import struct

import numpy as np
import pytest

from jaxsft import report

MARKUP = ["[bold]not bold[/bold]", "[/]", "a[0] = b[1]", "\\[x]", "end\\", ":smile:", "[link=x]y", "1 < 2 & [red]"]


@pytest.fixture
def wide(monkeypatch):
    """A console wide enough that no cell is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")


def write(folder, steps, held=()):
    rows = [{"step": s, "loss": 3 / s, "tokens_per_second": 1.0} for s in range(1, steps + 1)]
    rows += [{"step": s, "eval_loss": loss} for s, loss in held]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "metrics.jsonl"


@pytest.mark.parametrize(("steps", "held"), [(0, ()), (1, ()), (3, [(0, 4.0), (3, 1.0)]), (50, [(50, 0.5)])])
def test_the_loss_curve_is_a_png_of_readable_size(tmp_path, steps, held):
    report.plot_loss(write(tmp_path, steps, held), tmp_path / "loss.png")
    png = (tmp_path / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", png[16:24]) == (960, 540)
    assert 5_000 < len(png) < 300_000


def test_the_running_mean_is_the_weighted_mean_of_what_came_before():
    values = np.random.default_rng(0).normal(size=30)
    for i, mean in enumerate(report.running_mean(values, memory=0.8)):
        weights = 0.8 ** np.arange(i, -1, -1)
        assert mean == pytest.approx((weights * values[: i + 1]).sum() / weights.sum())


@pytest.mark.parametrize("text", MARKUP)
def test_text_that_looks_like_markup_is_printed_as_it_is(wide, capsys, text):
    report.table("samples", ("question", "answer"), [(text, "x"), ("y", text)])
    assert capsys.readouterr().out.count(text) == 2


def test_a_run_ends_with_samples_losses_and_places(wide, tmp_path, capsys):
    write(tmp_path, 4, [(0, 2.0), (4, 0.5)])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(bytes(1_230_000))
    report.finish(tmp_path, [("q[1]?", "wanted", "was", "is")], {"adapter": tmp_path / "adapter"})
    shown = capsys.readouterr().out
    for part in ("q[1]?", "wanted", "was", "is", "3.0000 -> 0.7500", "2.0000 -> 0.5000", "1.23 MB", "loss.png"):
        assert part in shown
    assert (tmp_path / "loss.png").is_file()


def test_a_run_without_samples_or_steps_ends_too(wide, tmp_path, capsys):
    report.finish(tmp_path, [], {})
    shown = capsys.readouterr().out
    assert "held-out" not in shown
    assert "metrics.jsonl" in shown


def test_other_metrics_are_drawn_where_there_are_some(tmp_path):
    rows = [{"step": 0, "eval_loss": 2.0, "eval_margin": 0.0}]
    rows += [{"step": i, "loss": 1.0, "learning_rate": 1.0, "margin": 0.1 * i, "kl": 0.0} for i in range(1, 30)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.plot_metrics(metrics, tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    metrics.write_text('{"step": 1, "loss": 1.0}\n')
    assert not report.plot_metrics(metrics, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
