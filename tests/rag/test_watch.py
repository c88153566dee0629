import threading
import time

from jaxsft.rag import watch


def test_changes_are_told_together_and_the_store_itself_is_not_a_change(tmp_path):
    (tmp_path / "store").mkdir()
    stop, told = threading.Event(), []

    def look():
        for number in watch.changes(tmp_path, besides=tmp_path / "store", stop=stop):
            told.append(number)

    thread = threading.Thread(target=look)
    thread.start()
    wait(lambda: told == [0])  # the watch is on
    (tmp_path / "store" / "data.lance").write_text("x")
    time.sleep(0.1)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    wait(lambda: len(told) == 2)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert told[0] == 0
    assert sum(told) >= 2
    assert len(told) == 2


def wait(until, seconds=20):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
