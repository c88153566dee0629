import pytest

from jaxsft import hub
from jaxsft.run import RunError


def test_either_an_adapter_or_a_checkpoint(run_here, small, tmp_path):
    for more in ([], ["--adapter", "a", "--checkpoint", "c"]):
        with pytest.raises(RunError, match="either adapter .* or checkpoint"):
            run_here("merge", "--base", small, "--out", str(tmp_path), *more)


def test_a_folder_that_is_no_checkpoint(run_here, tmp_path):
    with pytest.raises(RunError, match=r"is no checkpoint; give RUN/checkpoints/STEP"):
        run_here("merge", "--checkpoint", str(tmp_path / "9"), "--out", str(tmp_path / "out"))


def test_a_folder_that_is_no_adapter(run_here, small, tmp_path):
    with pytest.raises(hub.CheckpointError, match=r"no adapter folder .*adapter_config.json"):
        run_here("merge", "--base", small, "--adapter", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
