"""Names on the Hub, with a Hub that is made up: the library's functions, or what they ask."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import dsjax
from dsjax.checkpoint import hub, inspection, shape
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hub import Repository
from tests.checkpoint import fake_hub
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
        # The HTTP library's own, such as of a connection that ends too soon.
        (errors.HfHubHTTPError.__bases__[0], r"the Hub cannot be reached or refuses"),
        (errors.HFValidationError, r"the Hub cannot be reached or refuses"),
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


def test_mistakes_of_ours_are_not_taken_for_refusals(monkeypatch, nowhere):
    def mistaken(*arguments, **options):
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", mistaken)
    with pytest.raises(TypeError, match="unexpected keyword"):
        hub.located("me/x")


def asked_of_hub(address, home, *calls):
    """What the calls (names of functions of `hub`, and arguments) return or raise, in a process of
    their own: huggingface_hub reads its address when it is imported.
    """
    script = (
        "import json, sys; from pathlib import Path; from dsjax.checkpoint import hub\n"
        "for name, *rest in json.loads(sys.argv[1]):\n"
        "    rest = [Path(text) if text.startswith('/') else text for text in rest]\n"
        "    try: print(json.dumps(str(getattr(hub, name)(*rest))))\n"
        "    except ValueError as error: print(json.dumps(f'ValueError: {error}'))\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_made_up",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "modeling.py": b"print('never')",
    "onnx/model.safetensors": b"another form",
}


def test_files_come_from_a_hub_and_then_from_its_cache(nowhere, tmp_path):
    with fake_hub.serving(FILES) as served:
        asked = served.address, tmp_path / "home", ("located", "me/tiny")
        (folder,) = asked_of_hub(*asked)
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert found == {"config.json": b"{}", "model.safetensors": b"weights"}
        assert not any("modeling" in path or "onnx" in path for path in served.asked)
    assert asked_of_hub(*asked) == [folder]  # nobody answers now


def test_refusals_as_a_hub_sends_them(nowhere, tmp_path):
    names = [f"refused/{kind}" for kind in fake_hub.REFUSED]
    with fake_hub.serving({}) as served:
        said = asked_of_hub(
            served.address, tmp_path / "home", *(("located", name) for name in names)
        )
    unreachable = asked_of_hub(served.address, tmp_path / "home", ("located", "me/tiny"))
    expected = (
        "the Hub has no repository refused/missing that you may see",
        "the Hub asks to accept the terms on the page of refused/gated",
        "refused/other has no revision",
        "the Hub cannot be reached or refuses",
        "the Hub cannot be reached or refuses",
    )
    for text, message in zip([*said, *unreachable], expected, strict=True):
        assert text.startswith("ValueError: ") and message in text, text


def test_a_folder_is_pushed_to_a_hub(nowhere, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text('{"dim": 8}')
    with fake_hub.serving({}) as served:
        calls = ("push", str(made), "me/made"), ("push", str(made), "refused/gated")
        page, refused = asked_of_hub(served.address, tmp_path / "home", *calls)
    assert page == f"{served.address}/me/made"
    assert served.created[0] | {"visibility": "private"} == served.created[0]
    head, *files = served.pushed[0]
    assert head["value"]["summary"] == "Upload with dsjax"
    content = {file["value"]["path"]: file["value"]["content"] for file in files}
    assert base64.b64decode(content["config.json"]) == b'{"dim": 8}'
    assert "made is whole, but was not pushed" in refused
