"""A whole run on a toy: it learns what is rewarded, resumes to the bit, and refuses bad input."""

import dataclasses
import functools
import hashlib
import io
import json

import pytest
from rich.console import Console

import dsjax
from dsjax.checkpoint import manifest
from dsjax.config import MeshConfig, OptimConfig, PrecisionConfig
from dsjax.config.mesh import RolloutMeshConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.reinforcement import Reinforcement, RewardConfig, RlConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain import reinforcement
from dsjax.posttrain.experience import Experience
from dsjax.signals import StopRequest
from tests.posttrain.toy import write_hf, write_lines

TIMES = ("seconds", "per_second", "mfu", "memory_bytes")
REWARD = '''
def low(completion, problem):
    """The share of characters before "A"."""
    return sum(c < "A" for c in completion) / max(len(completion), 1)
'''

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    write_hf(folder / "V3", "V3")
    write_hf(folder / "Qwen2", "Qwen2")
    write_lines(folder / "train.jsonl", [{"prompt": f"{n}?", "answer": str(n)} for n in range(9)])
    write_lines(folder / "test.jsonl", [{"prompt": f"{n}!", "answer": str(n)} for n in range(3)])
    (folder / "mine.py").write_text(REWARD)
    return folder


def config_of(place, init="Qwen2", steps=2, mesh=None, optim=None, train=None, **rl):
    return Reinforcement(
        name="toy",
        init=str(place / init),
        train=TuningConfig(
            **{
                "steps": steps,
                "batch_size": 4,
                "log_every": 1,
                "eval_every": 0,
                "checkpoint_every": 1,
                "remat": "none",
                "tensorboard": False,
            }
            | (train or {})
        ),
        optim=OptimConfig(
            **{"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0}
            | {"weight_decay": 0.0}
            | (optim or {})
        ),
        precision=PrecisionConfig(compute="float32"),
        mesh=MeshConfig(**{"data": 1} | (mesh or {})),
        rl=RlConfig(
            **{
                "problems": str(place / "train.jsonl"),
                "prompts": 4,
                "group_size": 4,
                "max_new_tokens": 8,
                "rewards": (f"{place / 'mine.py'}:low",),
                "eval_samples": 2,
                "log_samples": -1,
            }
            | rl
        ),
    )


def learn(config, folder, monkeypatch, devices=1):
    small = functools.partial(make_mesh, n_devices=devices)
    monkeypatch.setattr(reinforcement, "make_mesh", small)
    shown = io.StringIO()
    code = reinforcement.learn(config, folder, command="again", console=Console(file=shown))
    return code, shown.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.heavy
def test_policy_learns_what_is_rewarded(place, tmp_path, monkeypatch):
    config = config_of(
        place, steps=15, beta=0.001, heldout=str(place / "test.jsonl"), minibatches=2,
        train={"checkpoint_every": 0, "eval_every": 10},
    )  # fmt: skip
    code, shown = learn(config, tmp_path, monkeypatch)
    assert code == 0 and "reward" in shown and "rollout" in shown
    logged = [line for line in lines(tmp_path / "metrics.jsonl") if "reward" in line]
    assert len(logged) == 15
    first, last = logged[0]["reward"], sum(line["reward"] for line in logged[-5:]) / 5
    assert first < 0.6 < 0.9 < last
    promised = (
        "reward reward_std format length entropy kl clipped rollout_tokens_per_second "
        "update_tokens_per_second engine_gap step tokens loss grad_norm learning_rate "
        "tokens_per_second step_seconds mfu rollout_seconds grade_seconds old_seconds "
        "update_seconds rho_max engine_gap_max"
    )
    assert set(promised.split()) <= logged[0].keys()
    assert max(line["engine_gap_max"] for line in logged) <= 1e-4
    assert all(line["step_seconds"] >= line["update_seconds"] for line in logged)
    samples = lines(tmp_path / "samples.jsonl")
    assert len(samples) == 15 * 16
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 15 and summary["eval_reward"] > first
    assert dsjax.load(tmp_path) is not None  # a run like any other


@pytest.mark.heavy
def test_policy_unlearns_what_is_punished(place, tmp_path, monkeypatch):
    """The control: the same run with the reward's sign turned ends at the other end."""
    config = dataclasses.replace(
        config_of(place, steps=15, beta=0.001, minibatches=2, train={"checkpoint_every": 0}),
        reward=RewardConfig(weights=(-1.0,)),
    )
    assert learn(config, tmp_path, monkeypatch)[0] == 0
    logged = [line for line in lines(tmp_path / "metrics.jsonl") if "reward" in line]
    worth = [line["reward_low"] for line in logged]
    assert logged[0]["reward"] == -worth[0]
    assert sum(worth[-5:]) / 5 < 0.1 < worth[0]


@pytest.mark.heavy
def test_policy_learns_from_the_rewards_of_steps(place, tmp_path, monkeypatch):
    """Each character is a step; what comes later cannot make up for it."""
    (tmp_path / "each.py").write_text(
        "def worth(completion, problem):\n"
        "    return [(end + 1, c < 'A') for end, c in enumerate(completion)] or None\n"
    )
    config = config_of(
        place, steps=15, beta=0.001, minibatches=2, train={"checkpoint_every": 0},
        rewards=(f"{tmp_path / 'each.py'}:worth",),
    )  # fmt: skip
    assert learn(config, tmp_path / "run", monkeypatch)[0] == 0
    logged = [line for line in lines(tmp_path / "run/metrics.jsonl") if "reward" in line]
    first, last = logged[0]["reward"], sum(line["reward"] for line in logged[-5:]) / 5
    assert first < 0.7 < 0.8 < last
    assert all(line["steps"] for line in lines(tmp_path / "run/samples.jsonl") if line["text"])


def test_resting_mtp_modules_count_no_operations(place, tmp_path, monkeypatch):
    def counted(model, length, **options):
        raise ZeroDivisionError(str(options))

    monkeypatch.setattr(reinforcement, "train_flops_per_token", counted)
    with pytest.raises(ZeroDivisionError, match="'mtp': False"):
        learn(config_of(place), tmp_path / "run", monkeypatch)


def digest(folder, steps):
    newest = manifest.verify(folder / "checkpoints" / str(steps))
    logged = [
        {key: line[key] for key in line if not key.endswith(TIMES)}
        for line in lines(folder / "metrics.jsonl")
    ]
    samples = (folder / "samples.jsonl").read_text()
    kept = [newest.leaves, newest.record["data"], logged, samples]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "place_of_death",
    [*(pytest.param(place, marks=SLOW) for place in ("rollout", "grading", "update")), "save"],
)
def test_killed_run_ends_with_the_same_bits(place_of_death, place, tmp_path, monkeypatch):
    config = config_of(place, "V3", steps=3, minibatches=2, reference_every=2, beta=0.1)
    whole = place / "whole"  # shared by the four
    if not whole.exists():
        assert learn(config, whole, monkeypatch)[0] == 0
    owner, name = {
        "rollout": (Experience, "_packed"),
        "grading": (Experience, "_write"),
        "update": (reinforcement.Timed, "__call__"),
        "save": (reinforcement.Session, "save"),
    }[place_of_death]
    original, calls = getattr(owner, name), []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            learn(config, tmp_path, monkeypatch)
    assert learn(config, tmp_path, monkeypatch)[0] == 0
    assert digest(tmp_path, 3) == digest(whole, 3)


@pytest.mark.heavy
def test_signal_saves_and_the_run_goes_on(place, tmp_path, monkeypatch):
    config, asked = config_of(place, steps=3), []

    def exit_code(request):
        asked.append(request)
        return 143 if len(asked) >= 2 else None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "exit_code", property(exit_code))
        code, shown = learn(config, tmp_path, monkeypatch)
    assert code == 143 and "to resume: again" in shown
    assert learn(config, tmp_path, monkeypatch)[0] == 0
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3]


@pytest.mark.heavy
def test_run_on_eight_devices_draws_the_same_answers(place, tmp_path, monkeypatch):
    one = config_of(place, "V3", steps=1, train={"batch_size": 4})
    eight = config_of(
        place, "V3", steps=1, train={"batch_size": 8}, mesh={"data": 2, "fsdp": 2, "expert": 2}
    )
    other = dataclasses.replace(eight, rollout_mesh=RolloutMeshConfig(tensor=2, expert=4))
    learn(one, tmp_path / "one", monkeypatch)
    learn(eight, tmp_path / "eight", monkeypatch, devices=8)
    learn(other, tmp_path / "other", monkeypatch, devices=8)
    texts = [
        [line["text"] for line in lines(tmp_path / name / "samples.jsonl")]
        for name in ("one", "eight", "other")
    ]
    assert texts[0] == texts[1] == texts[2]
    logged = [lines(tmp_path / name / "metrics.jsonl")[0] for name in ("eight", "other")]
    assert "move_seconds" not in logged[0] and logged[1]["move_seconds"] > 0
    assert logged[1]["engine_gap_max"] <= 1e-4


def refused(config, folder, monkeypatch, match):
    with pytest.raises(ValueError, match=match):
        learn(config, folder, monkeypatch)
    assert not (folder / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"answer": "4"}, r"bad\.jsonl:2 has no prompt but 'answer'"),
        ({"prompt": "x" * 300}, r"bad\.jsonl:2: the prompt of 30\d tokens"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, r"bad\.jsonl:2: message 0"),
        ({"prompt": "x", "numbers": [1], "target": "?"}, r"bad\.jsonl:2: reward 'countdown'"),
    ],
)
def test_bad_problem_is_named_by_file_and_line(line, match, place, tmp_path, monkeypatch):
    good = {"prompt": "2?", "numbers": [1, 1], "target": 2}
    path = write_lines(tmp_path / "bad.jsonl", [good, line])
    config = config_of(place, problems=str(path), rewards=("countdown",))
    refused(config, tmp_path / "run", monkeypatch, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"problems": ""}, r"rl\.problems is empty"),
        ({"problems": "/nowhere/*.jsonl"}, r"/nowhere"),
        ({"rewards": ("cuontdown",)}, r"there is no reward 'cuontdown'.*countdown"),
        ({"sequence_length": 8}, r"rl\.sequence_length=8 has no room"),
        ({"train": {"batch_size": 3}, "mesh": {"data": 2}}, r"3"),
        ({"max_new_tokens": 300}, r"rl\.max_new_tokens=300 leaves no room"),
        ({"speculative": True}, r"rl\.speculative=on drafts with MTP"),
    ],
)
def test_bad_config_is_refused_before_anything_compiles(
    changes, match, place, tmp_path, monkeypatch
):
    devices = 2 if "mesh" in changes else 1
    with pytest.raises(ValueError, match=match):
        learn(config_of(place, **changes), tmp_path / "run", monkeypatch, devices)
