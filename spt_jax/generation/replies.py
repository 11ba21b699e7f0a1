"""Where a generated reply ends: the text before the first role marker or line break."""

from __future__ import annotations

import re

from spt_jax.data.template import PlainTemplate

_CUT_OFFICIAL = re.compile(r"R:|Q:|Summary:|\n|:")


def cut_reply(text: str) -> str:
    """The reply in a generated text: everything before the first ``R:``, ``Q:``, ``Summary:`` or line break, stripped.

    A colon alone does not end a reply ("at 5:30" stays whole), and a marker inside a longer word ("FAQ:") is not one.
    Cutting is idempotent: a cut reply is cut no further.

    Args:
      text: What the LM generated after the inference prompt's last ``R:``.
    """
    return PlainTemplate().cut(text)


def cut_reply_official(text: str) -> str:
    """The reply as the authors' program cuts it: before the first match of ``R:|Q:|Summary:|\\n|:``, stripped.

    Any colon ends the reply ("at 5:30" becomes "at 5"); kept to reproduce published figures.

    Args:
      text: What the LM generated after the inference prompt's last ``R:``.
    """
    return _CUT_OFFICIAL.split(text, maxsplit=1)[0].strip()
