"""Names on the Hub, with a Hub that is made up."""

import huggingface_hub
import pytest
from huggingface_hub import errors

import dsjax
from dsjax.checkpoint import hub, inspection, shape
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hub import Repository
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES

LLAMA = CASES["llama"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """The tests run in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("deepseek-ai/DeepSeek-V3", Repository("deepseek-ai/DeepSeek-V3", None)),
        ("a-b/c.d@refs/pr/1", Repository("a-b/c.d", "refs/pr/1")),
        ("https://huggingface.co/a-b/c.d/tree/main", Repository("a-b/c.d", "main")),
        ("hf.co/a-b/c.d/", Repository("a-b/c.d", None)),
        ("hf:a/b", None),
        ("hf://a/b", Repository("a/b", None)),
        ("folder", None),
        ("/a/b", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("a/b.gguf/", Repository("a/b.gguf", None)),
    ],
)
def test_names_on_the_hub_are_recognized(path, found):
    assert hub.repository_of(path) == found


def test_what_is_here_or_was_mistyped_is_no_name_on_the_hub(nowhere):
    (nowhere / "runs").mkdir()
    assert hub.repository_of("runs/tiny") is None
    assert hub.located("runs/tiny").parts == ("runs", "tiny")
    assert hub.repository_of("https://huggingface.co/runs/tiny") == Repository("runs/tiny", None)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A Hub with one repository; returns what was asked of it."""
    folder, asked = write(tmp_path / "snapshot", LLAMA.config, plain(LLAMA)), []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_checkpoint_is_loaded_by_its_name(published, capsys):
    model = dsjax.load("someone/llama@v1")
    assert model.config == from_hf(LLAMA.config)
    ((name, options),) = published
    assert (name, options["revision"]) == ("someone/llama", "v1")
    assert "*.safetensors" in options["allow_patterns"] and options["ignore_patterns"] == ["*/*"]
    assert not any("py" in pattern for pattern in options["allow_patterns"])
    assert capsys.readouterr().err == "someone/llama@v1: from the Hugging Face Hub or its cache\n"


def test_shape_is_taken_without_weights(published):
    assert shape.model_of("someone/llama") == from_hf(LLAMA.config)
    assert inspection.summarize("someone/llama", expect=True)["total_params"] > 0
    assert all("*.safetensors" not in options["allow_patterns"] for _, options in published)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            errors.RepositoryNotFoundError,
            r"the Hub has no repository me/x that you may see; correct",
        ),
        (errors.GatedRepoError, r"accept the terms on the page of me/x and to log in \(hf auth"),
        (errors.RevisionNotFoundError, r"me/x has no revision v2"),
        (errors.LocalEntryNotFoundError, r"the Hub cannot be reached or refuses \(.*\); try again"),
        (ConnectionError, r"the Hub cannot be reached or refuses"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(monkeypatch, kind, message):
    def refuse(*arguments, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message) as raised:
        hub.located("me/x@v2")
    assert str(raised.value).startswith("me/x@v2 is not on this machine, and ")
    assert "hf download me/x --local-dir x, then name that folder" in str(raised.value)


def test_without_a_network_it_is_said_plainly():
    with pytest.raises(
        ValueError, match=r"nobody/nothing is not on this machine, and the Hub cannot"
    ):
        dsjax.load("nobody/nothing")


def test_full_disk_stays_an_error_of_the_system(monkeypatch):
    def fill(*arguments, **options):
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(OSError, match="No space"):
        hub.located("me/x")


class Api:
    """Notes what is uploaded."""

    calls: list[tuple[str, dict[str, object]]]

    def __getattr__(self, name):
        return lambda *arguments, **options: (
            self.calls.append((name, options)) or f"https://huggingface.co/{''.join(arguments)}"
        )


def test_push_creates_a_private_repository_and_uploads(monkeypatch, nowhere):
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push(nowhere, "me/x") == "https://huggingface.co/me/x"
    (nowhere / "x.gguf").write_bytes(b"")
    hub.push(nowhere / "x.gguf", "me/x")
    names = [name for name, _ in Api.calls]
    assert names == ["create_repo", "upload_folder", "create_repo", "upload_file"]
    assert Api.calls[0][1] == {"private": True, "exist_ok": True}
    assert Api.calls[3][1]["path_in_repo"] == "x.gguf"


def test_failed_push_names_what_was_made(monkeypatch, nowhere):
    class Refusing:
        def create_repo(self, *arguments, **options):
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    message = r"here is whole, but was not pushed: .*no route.*; later: hf upload me/x .*here"
    with pytest.raises(ValueError, match=message):
        hub.push(nowhere, "me/x")


@pytest.mark.parametrize("name", ["tiny", "me/tiny/x", "me/tiny@main", "/me", ""])
def test_push_wants_a_name(name):
    with pytest.raises(ValueError, match=r"is not the name of a repository: write OWNER/NAME"):
        hub.check_push(name)
    hub.check_push("me/tiny-1.5")
