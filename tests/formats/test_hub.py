"""Names of the hub are told from paths, and a download is of one commit, without pickles or code."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bitnet_jax.errors import UserError
from bitnet_jax.formats import hub


@pytest.mark.parametrize("name", ["microsoft/bitnet-b1.58-2B-4T", "1bitLLM/bitnet_b1_58-large", "a/b", "tiiuae/Falcon-E-3B-Instruct"])
def test_a_name_of_the_hub(name: str) -> None:
    assert hub.is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "model", "a/b/c", "/a/b", "a/", "/b", "../b", "./b", "a/..", "a/.b", "-a/b", "a--b/c", "a/b..c", "a /b", "a/b\n"),
        *("a/" + "b" * 97, "runs/model.safetensors", "out/model.gguf", "a/b.git", "C:\\a/b", "ä/b", "a/b\0"),
    ],
)
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not hub.is_name(name)


def test_a_path_that_exists_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("runs/first")
    Path("runs/first").mkdir(parents=True)
    assert not hub.is_name("runs/first")


class Stub(ModuleType):
    """huggingface_hub as far as `download` uses it."""

    def __init__(self, *, offline: bool = False, error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.constants = SimpleNamespace(HF_HUB_OFFLINE=offline)
        self.error, self.asked, self.downloads = error, [], []

    def HfApi(self) -> Any:
        def model_info(name: str, revision: str | None) -> Any:
            self.asked.append((name, revision))
            if self.error:
                raise self.error
            return SimpleNamespace(sha="c0ffee")

        return SimpleNamespace(model_info=model_info)

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.downloads.append((name, options))
        if self.error:
            raise self.error
        return f"/cache/models--owner--model/snapshots/{options['revision'] or 'c0ffee'}"


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    stub = Stub(**options)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return stub


def test_a_download_is_of_the_commit_that_the_branch_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = install(monkeypatch)
    assert hub.download("owner/model", "main") == (Path("/cache/models--owner--model/snapshots/c0ffee"), "c0ffee")
    assert stub.asked == [("owner/model", "main")]
    ((name, options),) = stub.downloads
    assert (name, options["revision"], options["local_files_only"]) == ("owner/model", "c0ffee", False)
    assert options["ignore_patterns"] == ["*/*"]
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in options["allow_patterns"])


def test_offline_the_cache_alone_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = install(monkeypatch, offline=True)
    assert hub.download("owner/model") == (Path("/cache/models--owner--model/snapshots/c0ffee"), "c0ffee")
    assert stub.asked == []
    assert stub.downloads[0][1]["local_files_only"]


def test_what_goes_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, error=RuntimeError("404\n\nRepository Not Found\n" + "x" * 1000))
    with pytest.raises(UserError, match=r"^owner/model at v1 cannot be downloaded: 404 Repository Not Found x+$") as caught:
        hub.download("owner/model", "v1")
    assert len(str(caught.value)) < 400
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub"):
        hub.download("owner/model")
    with pytest.raises(UserError, match="is no model of the hub: must be owner/model"):
        hub.download("model")
