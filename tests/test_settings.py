"""Config files, overrides and the JSON form: values come back typed, and mistakes are named."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsjax import settings
from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig
from dsjax.config.finetuning import FineTuning
from dsjax.config.preference import Preference

DENSE = ModelConfig(
    vocab_size=64, dim=16, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=32, attention="gqa"
)
CONFIG = Config(name="example", model=DENSE, data=DataConfig(sequence_length=64))


def write(tmp_path, text):
    path = tmp_path / "example.py"
    path.write_text(text)
    return path


SOURCE = """
from dsjax.config import Config, ModelConfig

config = Config(
    name="example",
    model=ModelConfig(
        vocab_size=64, dim=16, n_layers={n_layers}, n_dense_layers=2, n_heads=2, inter_dim=32,
        attention={attention},
    ),
)
"""


def test_load_config_reads_python_file(tmp_path):
    config = settings.load_config(write(tmp_path, SOURCE.format(n_layers=2, attention="'gqa'")))
    assert config == Config(name="example", model=DENSE)


def test_load_config_reads_json_and_run_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict(CONFIG)))
    assert settings.load_config(tmp_path / "config.json") == CONFIG
    assert settings.load_config(str(tmp_path)) == CONFIG


def test_any_of_several_roots_is_told_by_its_groups(tmp_path):
    tuned = FineTuning(name="tuned", init="base")
    for config in (CONFIG, tuned):
        (tmp_path / "config.json").write_text(json.dumps(settings.to_dict(config)))
        assert settings.load_any(tmp_path, (Config, FineTuning)) == config
    with pytest.raises(ValueError, match=r"end(s)? with `config = Config\(.*` or `config = Fine"):
        settings.load_any(write(tmp_path, "config = 3\n"), (Config, FineTuning))
    (tmp_path / "config.json").write_text('{"name": "x", "sfd": {}}')
    with pytest.raises(ValueError, match="sfd is not a config key"):
        settings.load_any(tmp_path, (Config, FineTuning))


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("sft_tiny", "sft"),
        ("dpo_tiny", "prefer"),
        ("grpo_countdown", "grpo"),
        ("janus_pro_1b_stage1", "paint"),
        ("pipelines/r1_tiny", "r1"),
        ("pipelines/shapes_tiny", "shapes"),
    ],
)
def test_config_of_another_tool_is_told_which_one_takes_it(name, tool):
    path = settings.find(f"configs/{name}.py")
    with pytest.raises(ValueError, match=rf"{name}\.py is a config .* run tools/{tool}\.py with"):
        settings.load_config(path)
    assert settings.packaged(Path("tools", f"{tool}.py"))
    with pytest.raises(
        ValueError, match=r"tiny\.py .* \(FineTuning or Preference\); run tools/tra"
    ):
        settings.load_any("tiny", (FineTuning, Preference))


def test_run_of_another_tool_is_told_which_one_takes_it(tmp_path):
    for config, wanted in ((CONFIG, FineTuning), (FineTuning(name="tuned"), Config)):
        (tmp_path / "config.json").write_text(json.dumps(settings.to_dict(config)))
        with pytest.raises(
            ValueError, match=rf"config\.json is a config .* run {config.tool} with"
        ):
            settings.load_config(tmp_path, wanted)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "x = 1\n",
            r"example\.py assigns nothing to `config`; .* ends with `config = Config\(",
        ),
        ("config = 3\n", r"example\.py assigns an object of type int to `config`"),
        ("x = 1\nconfig = (\n", r"example\.py line 2: syntax error: '\(' was never closed"),
        ("\nimport nowhere_to_be_found\n", r"example\.py line 2: ModuleNotFoundError: No module"),
        (
            SOURCE.format(n_layers=1, attention="'gqa'"),
            r"example\.py line 6: model\.n_dense_layers=2 exceeds model\.n_layers=1",
        ),
        (
            SOURCE.format(n_layers=2, attention="'gqq'"),
            r"example\.py.*model\.attention='gqq' must be one of mla, gqa",
        ),
        (
            SOURCE.format(n_layers=2.0, attention="'gqa'"),
            r"example\.py.*model\.n_layers=2\.0 must be a whole number",
        ),
    ],
)
def test_load_config_names_file_and_line(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        settings.load_config(write(tmp_path, source))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"name": }', r"config\.json is not JSON: .* at line 2"),
        ("[1]", r"config\.json holds a JSON list, not an object"),
        ('"\xff"', r"config\.json is not UTF-8 text"),
        ('{"name": "a", "name": "b"}', r"config\.json has the key 'name' twice"),
        ('{"model_type": "llama", "hidden_size": 8}', r"config\.json describes a checkpoint, not"),
        ('{"family": "llama", "model": {}}', r"config\.json describes a checkpoint, not a run"),
    ],
)
def test_load_config_refuses_broken_json(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        settings.load_config(tmp_path / "config.json")


def test_load_config_names_missing_file_and_nearest(tmp_path):
    path = write(tmp_path, "")
    with pytest.raises(FileNotFoundError, match=r"no config .*exampel\.py; did you mean .*example"):
        settings.load_config(tmp_path / "exampel.py")
    with pytest.raises(
        FileNotFoundError, match=r"no config .*/example; did you mean .*example\.py"
    ):
        settings.load_config(tmp_path / "example")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is a folder without a config\.json"):
        settings.load_config(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"example\.yaml is not a config: name a \.py file"):
        settings.load_config(path.rename(tmp_path / "example.yaml"))


def test_misspelt_packaged_config_is_suggested_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config tinny; did you mean tiny\?"):
        settings.load_config("tinny")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.steps=300", 300),
        ("train.steps=1_000", 1000),
        ("train.steps=1e6", 1_000_000),
        ("train.seed=9007199254740993", 9007199254740993),  # not a float in between
        ("optim.learning_rate=3e-4", 3e-4),
        ("optim.learning_rate=1", 1.0),
        ("model.tie_embed=on", True),
        ("model.tie_embed=False", False),
        ("model.rope_scaling=linear", "linear"),
        ("data.files=a=b/*.txt", "a=b/*.txt"),
        ("data.files=", ""),
        ("optim.decay_points=0.1, 0.2,0.3", (0.1, 0.2, 0.3)),
        ("name=other", "other"),
    ],
)
def test_override_reads_value_of_the_keys_type(assignment, value):
    changed = settings.override(CONFIG, [assignment])
    for part in assignment.partition("=")[0].split("."):
        changed = getattr(changed, part)
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "model.n_layer=3",
            r"^model\.n_layer is not a config key; did you mean model\.n_layers\?$",
        ),
        ("steps=3", r"steps is not a config key; did you mean train\.steps\?"),
        ("train.sequence_length=3", r"did you mean data\.sequence_length\?"),
        ("seed=3", r"did you mean data\.seed or train\.seed\?"),
        ("model=3", r"model is not a config key but a group of keys such as model\.vocab_size"),
        ("zzz.qqq=3", r"zzz\.qqq is not a config key; keys and groups are name, init, model, "),
        ("mesh.qqq=3", r"mesh\.qqq is not a config key; keys of this group are mesh\.data, "),
        ("train.steps", r"--set takes KEY=VALUE, not 'train\.steps'"),
        ("=3", r"--set takes KEY=VALUE, not '=3'"),
        ("train.steps=many", r"train\.steps='many' must be a whole number"),
        ("train.steps=1.5", r"train\.steps='1\.5' must be a whole number"),
        ("train.steps=on", r"train\.steps='on' must be a whole number"),
        ("train.steps=1e400", r"must be a whole number"),
        ("optim.learning_rate=nan", r"optim\.learning_rate='nan' must be a finite number"),
        (
            "optim.decay_points=0.1:x",
            r"optim\.decay_points='0\.1:x' must be a finite number, or several separated by commas",
        ),
        ("model.tie_embed=2", r"model\.tie_embed='2' must be on or off"),
        ("model.rope_scaling=yarm", r"must be one of none, linear, yarn, llama3"),
        ("train.steps=0", r"train\.steps=0 must be greater than 0"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        settings.override(CONFIG, [assignment])


def test_override_names_every_bad_assignment():
    with pytest.raises(ValueError, match=r"(?s)model\.n_layer is.*train\.step is"):
        settings.override(CONFIG, ["model.n_layer=3", "train.step=2"])


def test_override_checks_only_the_result():
    """Each of the two alone would break a rule."""
    changed = settings.override(CONFIG, ["model.n_layers=3", "model.n_dense_layers=3"])
    assert (changed.model.n_layers, changed.model.n_dense_layers) == (3, 3)
    changed = settings.override(CONFIG, ["data.sequence_length=8192", "model.max_seq_len=8192"])
    assert changed.data.sequence_length == 8192
    with pytest.raises(ValueError, match=r"sequence_length=8192 exceeds model\.max_seq_len=4096"):
        settings.override(CONFIG, ["data.sequence_length=8192"])


def test_override_keeps_later_value():
    assert settings.override(CONFIG, ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_dict_round_trip_survives_json():
    values = json.loads(json.dumps(settings.to_dict(CONFIG)))
    assert settings.from_dict(values) == CONFIG
    assert isinstance(settings.from_dict(values).optim.decay_points, tuple)


def test_from_dict_names_unknown_and_missing_keys():
    values = settings.to_dict(CONFIG)
    values["model"]["n_layer"] = values["model"].pop("n_layers")
    message = (
        r"^run: model\.n_layer is not a config key; did you mean model\.n_layers\?; "
        r"model\.n_layers is missing; a newer version of dsjax may have written the unknown keys$"
    )
    with pytest.raises(ValueError, match=message):
        settings.from_dict(values, "run")
    with pytest.raises(ValueError, match=r"train must be an object of keys, not 3"):
        settings.from_dict(settings.to_dict(CONFIG) | {"train": 3})


def test_absent_keys_take_their_defaults_and_are_said_once(caplog, tmp_path):
    values = settings.to_dict(CONFIG)
    del values["mesh"], values["train"]["compare_every"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    for _ in range(2):
        assert settings.load_config(tmp_path) == CONFIG
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{tmp_path / 'config.json'} comes from an older version and lacks ")
    assert "train.compare_every, mesh.data, " in message and message.endswith("defaults are used")
    caplog.clear()
    assert settings.from_dict(settings.to_dict(CONFIG)) == CONFIG and not caplog.records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    names: tuple[str, ...] = ("math", "format")
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """A root of another kind of experiment, which shares groups with pre-training."""

    name: str
    model: ModelConfig
    train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(steps=7))
    reward: Reward = dataclasses.field(default_factory=Reward)
    init: str = ""


TUNING = Tuning(name="example", model=DENSE, init="converted/v3", reward=Reward(scale=0.5))


def test_another_root_is_read_overridden_and_kept(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict(TUNING)))
    assert settings.load_config(tmp_path, Tuning) == TUNING
    changed = settings.override(TUNING, ["reward.names=code", "train.seed=3", "init="])
    assert changed.reward == Reward(names=("code",), scale=0.5)
    assert (changed.train.seed, changed.train.steps, changed.init) == (3, 7, "")
    with pytest.raises(
        ValueError, match=r"^data\.seed is not a config key; did you mean train\.seed"
    ):
        settings.override(TUNING, ["data.seed=1"])
    assert not caplog.records
    # A root's own default of a group goes before that of the group.
    assert settings.from_dict(
        {"name": "example", "model": settings.to_dict(DENSE)}, "x", Tuning
    ) == (Tuning(name="example", model=DENSE))
    assert (
        "lacks train.steps, " in caplog.text and "reward.names, reward.scale, init;" in caplog.text
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    seed: int = 0


def test_tuple_of_objects_is_read_whole():
    whole = Whole(parts=(Part(name="a"), Part(name="b", size=2)))
    assert settings.from_dict(settings.to_dict(whole), "here", Whole) == whole
    assert settings.override(whole, ["seed=3"]) == dataclasses.replace(whole, seed=3)
    with pytest.raises(ValueError, match="parts='a' is a list of objects"):
        settings.override(whole, ["parts=a"])
    with pytest.raises(ValueError, match=r"Part.*size='x' must be a whole number"):
        settings.from_dict({"parts": [{"name": "a", "size": "x"}]}, "here", Whole)


def test_a_group_alone_is_read():
    assert settings.from_dict(settings.to_dict(DENSE), "x", ModelConfig) == DENSE
    with pytest.raises(ValueError, match=r"^x: dim is missing; n_layers is missing"):
        settings.from_dict({"vocab_size": 3}, "x", ModelConfig)


def test_config_file_of_another_root_is_refused(tmp_path):
    text = SOURCE.format(n_layers=2, attention="'gqa'")
    with pytest.raises(ValueError, match=r"tools/train.py takes.* another kind \(Tuning\)"):
        settings.load_config(write(tmp_path, text), Tuning)
    made = f"import sys\nconfig = sys.modules[{__name__!r}].TUNING\n"
    assert settings.load_config(write(tmp_path, made), Tuning) == TUNING


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("train", "steps", True),
        ("train", "steps", 1.0),
        ("train", "steps", None),
        ("optim", "learning_rate", "1e-3"),
        ("optim", "learning_rate", float("inf")),
        ("optim", "learning_rate", 10**400),
        ("optim", "decay_points", 0.5),
        ("model", "tie_embed", 1),
        ("model", "score_func", ["sigmoid"]),
        ("data", "files", 3),
    ],
)
def test_from_dict_refuses_wrong_type(group, key, value):
    values = settings.to_dict(CONFIG)
    values[group][key] = value
    with pytest.raises(ValueError, match=rf"{group}\.{key}=.* must be "):
        settings.from_dict(values)


def test_content_hash_depends_on_every_value():
    same = Config(name="example", model=DENSE, data=DataConfig(sequence_length=64))
    assert settings.content_hash(CONFIG) == settings.content_hash(same)
    other = Config(name="example", model=DENSE, data=CONFIG.data, train=TrainConfig(seed=1))
    assert settings.content_hash(CONFIG) != settings.content_hash(other)
    assert len(settings.content_hash(CONFIG)) == 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A root whose model comes from elsewhere."""

    name: str
    model: ModelConfig | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def test_group_from_elsewhere_is_kept_whole():
    bare, filled = Tuned(name="example"), Tuned(name="example", model=DENSE)
    for config in (bare, filled):
        assert settings.from_dict(settings.to_dict(config), kind=Tuned) == config
    longer = settings.override(filled, ["data.sequence_length=64"])
    assert longer.model == DENSE and longer.data.sequence_length == 64


@pytest.mark.parametrize("key", ["model", "model.dim"])
def test_group_from_elsewhere_cannot_be_set(key):
    with pytest.raises(ValueError, match=f"^{key} cannot be set: model comes whole, with the"):
        settings.override(Tuned(name="example", model=DENSE), [f"{key}=8"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "x: model=3 must be an object of keys"),
        (
            settings.to_dict(DENSE) | {"dims": 8},
            r"x: model: dims is not a config key; did you mean",
        ),
        (settings.to_dict(DENSE) | {"dim": 0}, r"x: model: model\.dim=0 must be greater than 0"),
    ],
)
def test_damage_in_a_group_from_elsewhere_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        settings.from_dict({"name": "example", "model": model}, "x", Tuned)


def test_packaged_configs_are_found_by_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "configs/tiny.py", "configs/tiny"):
        assert settings.load_config(name).name == "tiny"
    Path("tiny.py").write_text(SOURCE.format(n_layers=2, attention="'gqa'"))
    assert settings.load_config("tiny.py").name == "example"  # a file of the user's comes first
    assert settings.load_config("tiny").name == "tiny"
    with pytest.raises(FileNotFoundError, match="there is no config tinny"):
        settings.load_config("tinny")
