import threading
import warnings

import pytest

from umiad.io.quiet import recorded_warnings, silent_warnings


def test_warnings_are_dropped_or_recorded_and_the_filters_come_back() -> None:
    before = list(warnings.filters)
    with silent_warnings():
        warnings.warn("lost", UserWarning, stacklevel=1)
    with recorded_warnings(dropped=BytesWarning) as messages:
        warnings.warn(" twice ", UserWarning, stacklevel=1)
        warnings.warn(" twice ", UserWarning, stacklevel=1)
        warnings.warn("lost", BytesWarning, stacklevel=1)
        with silent_warnings():  # one reader within another
            warnings.warn("lost", UserWarning, stacklevel=1)
    assert messages == ["twice", "twice"]
    assert warnings.filters == before


def test_an_error_passes_and_gives_the_lock_back() -> None:
    before = list(warnings.filters)
    for quiet in (silent_warnings(), recorded_warnings(dropped=BytesWarning)):
        with pytest.raises(ValueError, match="damaged"), quiet:
            raise ValueError("damaged")
    assert warnings.filters == before


def test_readers_in_threads_restore_the_filters_one_after_the_other() -> None:
    before, inside, go_on, entered = list(warnings.filters), threading.Event(), threading.Event(), []

    def first() -> None:
        with silent_warnings():
            inside.set()
            go_on.wait(10)

    def second() -> None:
        with recorded_warnings(dropped=BytesWarning):
            entered.append(go_on.is_set())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # long enough to get in, were there no lock
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert entered == [True]
    assert warnings.filters == before
