"""No text of a stranger reaches a terminal, Markdown or JSON as anything but text."""

import json
import sys

import pytest

from kcrprune.cli import render
from kcrprune.cli.streams import Unheard
from kcrprune.events import Note
from kcrprune.measure.tables import Table, code, escaped
from kcrprune.printable import printable, printable_json, printable_lines
from tests.cli.conftest import DENSE

# escape, its one-byte form, an override of direction, a byte of a name that is not UTF-8
WILD = "a\x1b[31m\x9b2Jb\u202ec\udcff"
SHOWN = r"a\x1b[31m\x9b2Jb\u202ec\udcff"


def test_escapes_stand_for_what_is_not_shown():
    assert printable(WILD) == SHOWN
    assert printable("Käse, 皿 and 😀") == "Käse, 皿 and 😀"
    assert printable("one\ntwo", 5) == r"one\nt"
    assert printable_lines("one\n\x07two") == "one\n\\x07two"


def test_json_stays_json():
    text = json.dumps({WILD: "é\n"}, ensure_ascii=False, indent=2)
    assert "\x9b" in text
    assert printable_json(text).replace("\n", "").isprintable()
    assert json.loads(printable_json(text)) == {WILD: "é\n"}


@pytest.mark.parametrize("form", ["table", "json", "markdown"])
def test_a_strange_name_is_shown_as_text(capsys, form):
    strange = DENSE.model_copy(update={"source": f"<img src=x onerror=alert(1)>{WILD}", "notes": (f"<b>{WILD}",)})
    render.reports([strange], form=form)
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert "\\u202e" in shown
    assert ("<img" in shown) == (form != "markdown")


def test_errors_and_notes_are_text(capsys):
    render.failure(f"error: {WILD}")
    assert capsys.readouterr().err == f"error: {SHOWN}\n"
    assert Note(f"two\nlines {WILD}").text == f"two\nlines {SHOWN}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>&</script>", "&lt;script&gt;&amp;&lt;/script&gt;"),
        ("[a](javascript:b)", r"\[a\](javascript:b)"),
        ("a|b`c\\d", r"a\|b\`c\\d"),
        ("vit_tiny_patch16 (blocks.0)", "vit_tiny_patch16 (blocks.0)"),
    ],
)
def test_markdown_reads_nothing_into_a_text(text, shown):
    assert escaped(text) == shown


def test_code_holds_its_backticks():
    assert code("data = a") == "`data = a`"
    assert code("data = `` <b>") == "``` data = `` <b> ```"


def test_a_title_is_text_too(capsys):
    render._console(Unheard(sys.stdout)).print(render._drawn(Table(WILD, ("", "[red]x"), (("a", "b"),))))
    shown = capsys.readouterr().out
    assert SHOWN in shown.replace("\n", "")
    assert "[red]x" in shown
