"""Names of files and folders that some program, page, table or shell gets wrong. Harmless test material."""

from __future__ import annotations

import os

NAMES: tuple[bytes, ...] = tuple(
    name if isinstance(name, bytes) else os.fsencode(name)
    for name in (
        "with spaces.png", " leading.png", "trailing.png ", "new\nline.png", "carriage\r\nreturn.png", "tab\t.png",
        ";rm -rf ~;.png", "-rf.png", "--out=x.png", "$(id).png", "`id`.png", "|id|.png", "a&b.png", "~root.png",
        "\N{GRINNING FACE}.png", "\u202egnp.exe.png", "\u00e9.png", "e\u0301.png", "\u200b.png", "\u0130.png",
        "<img src=x onerror=alert(1)>.png", "\"><svg onload=alert(1)>.png", "'-alert(1)-'.png", "&lt;b&gt;.png",
        "=cmd|' !A0.png", "+1.png", "@SUM(A1).png", "%s%n%x.png", "{0}.png", "[red]bold[&red].png", "[link].png",
        "\x1b[31mred.png", "\x1b]0;title\x07.png", "\x7f.png", "CON.png", "nul.png", "a:b.png", "a\\b.png",
        "comma,semicolon;quote\".png", "*.png", "?.png", "#1.png", "a#3.png", "case.png", "CASE.png",
        b"\xff\xfe.png", b"caf\xe9.png", b"\xed\xa0\x80.png", "n" * 251 + ".png", "\N{GRINNING FACE}" * 62 + ".png",
    )
)  # fmt: skip
"""As bytes, since some are no text; all of them end as names of PNG files do, but for one with a blank behind."""
