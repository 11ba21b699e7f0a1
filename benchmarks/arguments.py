"""What benchmarks' options may be."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number above 0, as argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999,999,999")
    return int(text)
