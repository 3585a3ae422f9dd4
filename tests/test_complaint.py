"""What strict means, and which line a warning names."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

import commcomp
from commcomp.complaint import complain, warn


def test_strict_raises_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"^too small, or pass strict=False$"):
        complain("too small", strict=True)
    with pytest.raises(RuntimeError, match=r"^too small, or, if they are tied, pass strict=False$"):
        complain("too small", strict=True, error=RuntimeError, unless="they are tied")


def test_without_strict_the_same_is_a_warning_at_the_users_line() -> None:
    with pytest.warns(UserWarning, match="^too small$") as seen:
        complain("too small", strict=False)
    assert seen[0].filename == __file__


def test_a_warning_that_no_line_of_the_users_led_to_names_one_of_ours() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thread = threading.Thread(target=warn, args=("from a worker",))
        thread.start()
        thread.join()
    assert [str(one.message) for one in seen] == ["from a worker"]
    assert seen[0].filename.startswith(os.path.dirname(commcomp.__file__)) or seen[0].filename == threading.__file__
