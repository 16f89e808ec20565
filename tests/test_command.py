"""Exit codes and messages that all tools share."""

import argparse
import errno
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dsjax import command
from dsjax.config import Config, ModelConfig, TrainConfig
from dsjax.config.posttraining import PostTraining

MODEL = ModelConfig(
    vocab_size=64, dim=16, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=32, attention="gqa"
)


def parser():
    return command.make_parser("Example.")


def raiser(error):
    def execute(arguments):
        raise error

    return execute


def test_run_returns_success_or_the_code_given():
    assert command.run(parser(), lambda arguments: None, []) == 0
    assert command.run(parser(), lambda arguments: 3, []) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a=1 must be 2"), "error: a=1 must be 2"),
        (FileNotFoundError("there is no config x.py"), "error: there is no config x.py"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"),
            "error: No such file or directory: x.txt",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
            "error: no space left on device writing run/metrics.jsonl; free some",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: /run/ckpt: No space left on device"),
            "error: no space left on device (RESOURCE_EXHAUSTED: /run/ckpt",
        ),
        (KeyError("x"), "internal error: KeyError: 'x'; run again with --debug"),
    ],
)
def test_run_prints_one_message_and_returns_failure(capsys, error, message):
    assert command.run(parser(), raiser(error), []) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("program", "named"),
    [("tools/sft.py", "tools/convert.py"), ("dsjax sft", "dsjax convert")],
)
def test_remedies_name_tools_as_they_are_called(capsys, monkeypatch, program, named):
    monkeypatch.setattr("sys.argv", [program])
    error = ValueError("convert it: tools/convert.py import, or python tools/convert.py import")
    assert command.run(parser(), raiser(error), []) == 1
    assert capsys.readouterr().err.count(f" {named} import") == 2


def test_a_process_that_is_a_command_collects_garbage_seldom(monkeypatch):
    found = []
    monkeypatch.setattr("sys.argv", ["tools/train.py"])
    for what in (
        (command.signal, "signal"),
        (command.atexit, "register"),
        (command.gc, "set_threshold"),
    ):
        monkeypatch.setattr(*what, lambda *arguments: found.append(arguments))
    assert command.run(parser(), lambda arguments: None, []) == 0 and not found
    assert command.run(parser(), lambda arguments: None) == 0
    assert max(found[0]) >= 50_000


def test_run_with_debug_prints_traceback(capsys):
    assert command.run(parser(), raiser(ValueError("bad")), ["--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "error: bad" in printed


def test_run_returns_130_on_interrupt(capsys):
    assert command.run(parser(), raiser(KeyboardInterrupt()), []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_run_lets_system_exit_pass():
    with pytest.raises(SystemExit) as exit_info:
        command.run(parser(), raiser(SystemExit(143)), [])
    assert exit_info.value.code == 143


def test_run_exits_2_on_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        command.run(parser(), lambda arguments: None, ["--nonsense"])
    assert exit_info.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_run_stays_quiet_when_the_reader_closes_the_pipe():
    code = "import sys\nfrom dsjax import command\n"
    code += "def execute(arguments):\n    for i in range(100000): print(i)\n"
    code += "sys.exit(command.run(command.make_parser('x'), execute, []))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def interrupted(body):
    """Runs a command whose `execute` has this body, as a process of its own."""
    code = "import atexit, os, signal, sys, time\nfrom dsjax import command\n"
    code += "atexit.register(os._exit, 139)\n"  # taking the interpreter apart ends so
    code += "def _xla_gc_callback(): os.kill(os.getpid(), signal.SIGINT)\n"
    code += f"def execute(arguments):\n{textwrap.indent(body, '    ')}\n"
    code += "sys.exit(command.run(command.make_parser('x'), execute))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_interrupted_command_leaves_before_the_interpreter_is_taken_apart():
    """What was registered for the end is done before."""
    done = interrupted("atexit.register(print, 'cleaned up')\nraise KeyboardInterrupt")
    assert done.returncode == 130 and done.stdout == "cleaned up\n"
    assert done.stderr.endswith(": interrupted\n")
    assert interrupted("raise SystemExit(143)").returncode == 143
    assert interrupted("pass").returncode == 139  # as ever without a signal


def test_interrupt_that_jax_would_swallow_comes_again():
    done = interrupted(
        "try: _xla_gc_callback()\n"
        "except KeyboardInterrupt: print('swallowed')\n"
        "for _ in range(1000): time.sleep(0.01)\n"
    )
    assert done.returncode == 130 and done.stdout == ""


def test_interrupt_while_a_compiled_module_is_imported_comes_again():
    done = interrupted(
        "from importlib.machinery import ExtensionFileLoader\n"
        "class Loader(ExtensionFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        try: os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt: raise ImportError('initialization failed')\n"
        "Loader('optional', 'optional.so').exec_module(None)\n"
        "for _ in range(1000): time.sleep(0.01)\n"
    )
    assert done.returncode == 130, done.stderr


def test_load_applies_every_set(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "from dsjax.config import Config, ModelConfig\n"
        "config = Config(name='example', model=ModelConfig(vocab_size=64, dim=16, n_layers=2,"
        " n_dense_layers=2, n_heads=2, inter_dim=32, attention='gqa'))\n"
    )
    example = parser()
    command.add_config(example)
    arguments = example.parse_args(
        [str(path), "--set", "train.steps=3", "train.seed=1", "--set", "name=x"]
    )
    config = command.load(arguments)
    assert (config.train.steps, config.train.seed, config.name) == (3, 1, "x")
    assert config.model == MODEL and isinstance(config, Config)


def test_config_argument_is_optional_only_with_default():
    with_default, without = parser(), parser()
    command.add_config(with_default, default="configs/tiny.py")
    command.add_config(without)
    assert with_default.parse_args([]).config == "configs/tiny.py"
    with pytest.raises(SystemExit):
        without.parse_args([])


def test_help_answers_before_heavy_imports():
    code = "import sys\nfrom dsjax import command\n"
    code += "heavy = {'jax', 'flax', 'orbax', 'grain', 'numpy', 'rich'} & set(sys.modules)\n"
    code += "sys.exit(f'imports {heavy}' if heavy else 0)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5  # a tenth of a second on a free machine


def test_parser_prints_description_as_it_stands():
    text = command.make_parser("First.\n\n  python tools/x.py --y\n").format_help()
    assert "First.\n\n  python tools/x.py --y\n" in text
    assert isinstance(parser(), argparse.ArgumentParser)


def checkpoint_arguments(*argv):
    example = parser()
    command.add_checkpoint(example)
    return example.parse_args(argv)


def test_checkpoint_arguments_are_read():
    arguments = checkpoint_arguments("ckpt", "--dtype", "bfloat16", "--mesh", "data=2, tensor=-1")
    assert arguments.checkpoint == Path("ckpt") and arguments.dtype == "bfloat16"
    assert arguments.mesh == {"data": 2, "tensor": -1}
    arguments = checkpoint_arguments("ckpt")
    assert arguments.dtype is None and arguments.mesh == {}


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_weights_may_be_small(dtype):
    assert checkpoint_arguments("ckpt", "--dtype", dtype).dtype == dtype


def test_another_element_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        checkpoint_arguments("ckpt", "--dtype", "int3")
    message = capsys.readouterr().err
    assert "'int3'" in message and "int4" in message


def test_overrides_are_json_values_or_text():
    arguments = checkpoint_arguments(
        "ckpt", "--override", "num_nextn_predict_layers=0", "rope_scaling=null",
        "--override", "torch_dtype=float32", 'rope_scaling={"type": "yarn"}', "a=b=c", "x=true",
    )  # fmt: skip
    assert dict(arguments.override) == {
        "num_nextn_predict_layers": 0,
        "rope_scaling": {"type": "yarn"},  # the later value holds
        "torch_dtype": "float32",
        "a": "b=c",
        "x": True,
    }
    assert checkpoint_arguments("ckpt").override == []


@pytest.mark.parametrize("text", ["rope_scaling", "=1", "rope_theta="])
def test_overrides_of_another_form_are_wrong_usage(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        checkpoint_arguments("ckpt", "--override", text)
    assert stopped.value.code == 2
    assert f"{text!r} is not KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            "pipe=2",
            "'pipe=2' does not set one of the axes data, fsdp, expert, context, tensor once",
        ),
        ("data=2,data=2", "does not set one of the axes data, fsdp, expert, context, tensor once"),
        ("data", "'data': the size of a mesh axis is a whole number above 0, or -1"),
        ("tensor=0", "'tensor=0': the size of a mesh axis"),
        ("data=-1,tensor=-1", "only one mesh axis may be -1, not data and tensor"),
    ],
)
def test_checkpoint_mesh_is_checked(mesh, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        checkpoint_arguments("ckpt", "--mesh", mesh)
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_list_given_twice_is_both():
    made = parser()
    made.add_argument("--image", nargs="+")
    made.add_argument("--lengths", nargs="+", type=int, default=[3])
    made.add_argument("--seed", type=int)
    found = made.parse_args(
        "--image a --lengths 4 --image b c --lengths 5 --seed 1 --seed 2".split()
    )
    assert (found.image, found.lengths, found.seed) == (["a", "b", "c"], [4, 5], 2)
    assert made.parse_args([]).lengths == [3]


def test_commands_take_debug_before_and_after(capsys):
    example = parser()
    commands = command.add_commands(example, {"list": "all of them", "show": "one of them"})
    commands["show"].add_argument("path")
    arguments = example.parse_args(["show", "x"])
    assert (arguments.command, arguments.path, arguments.debug) == ("show", "x", False)
    for argv in (["--debug", "list"], ["list", "--debug"]):
        arguments = example.parse_args(argv)
        assert arguments.command == "list" and arguments.debug
    with pytest.raises(SystemExit):
        example.parse_args([])
    assert "all of them" in example.format_help()
    assert "--debug" not in commands["list"].format_help()


def test_forms_of_a_tool_are_kept_apart(capsys):
    parser = command.make_parser("a tool")
    command.add_config(parser, optional=True)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--dry-run", action="store_true")

    def check(*argv):
        arguments = parser.parse_args(argv)
        command.require(parser, arguments, ["config"], without=["stages", "dry_run"])

    check("x.py")
    for argv, message in (
        ([], "required: CONFIG"),
        (["x.py", "--stages", "0"], "--stages: not together with CONFIG"),
        (["x.py", "--dry-run"], "--dry-run: not together with CONFIG"),
    ):
        with pytest.raises(SystemExit) as stopped:
            check(*argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_config_of_another_root_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    example = parser()
    command.add_config(example)
    arguments = example.parse_args([str(tmp_path), "--set", "seed=5"])
    config = command.load(arguments, TrainConfig)
    assert (type(config), config.steps, config.seed) == (TrainConfig, 3, 5)


@pytest.fixture
def tuning(tmp_path):
    """(words after CONFIG) -> the config and the folder."""
    path = tmp_path / "tuned.py"
    path.write_text(
        "from dsjax.config.posttraining import PostTraining\nconfig = PostTraining(name='tuned')\n"
    )

    def load(*words):
        own = parser()
        command.add_config(own)
        command.add_initial(own)
        return command.load_initial(own.parse_args([str(path), *words]), PostTraining)

    return load


def test_initial_checkpoint_comes_with_init(tuning):
    config, folder = tuning("--init", "runs/base", "--set", "train.steps=3")
    assert (config.init, config.train.steps) == ("runs/base", 3)
    assert folder == Path("runs/tuned")
    config, folder = tuning("--set", "init=base", "--workdir", "here")
    assert (config.init, folder) == ("base", Path("here"))


def test_initial_checkpoint_is_asked_for(tuning):
    with pytest.raises(ValueError, match=r"tuned begins with a checkpoint; name it: --init CKPT"):
        tuning()


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["tools/train.py", "--workdir", "a b"], "python tools/train.py --workdir 'a b'"),
        (["dsjax train", "--workdir", "a b"], "dsjax train --workdir 'a b'"),
    ],
)
def test_line_is_the_command_that_runs(typed, recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", typed)
    assert command.line() == recorded
