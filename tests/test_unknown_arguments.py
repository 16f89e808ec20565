"""Forms of other projects, and what to write instead."""

import pytest

from dsjax import command, settings, unknown_arguments
from dsjax.config.finetuning import FineTuning


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--train.steps", "5", "--known", "7"], [("--train.steps", "5")]),
        (["--train.steps=5", "x.py"], [("--train.steps", "5")]),
        (["--flag", "--other"], [("--flag", None), ("--other", None)]),
        (["--known", "--not a flag", "-x", "--", "--behind"], []),
        (["--empty="], [("--empty", "")]),
    ],
)
def test_unknown_flags_are_found_with_their_values(argv, found):
    assert unknown_arguments.unknown(argv, {"--known"}) == found


def parse(*argv, kinds=None):
    parser = command.make_parser("x")
    command.add_config(parser, default="configs/tiny.py", **({"kinds": kinds} if kinds else {}))
    command.add_initial(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.steps", "5"], "keys of the config follow --set: write --set train.steps=5"),
        (["--train.steps=5"], "write --set train.steps=5"),
        (["--steps", "5"], "write --set train.steps=5"),
        (["x.py", "train.steps=5"], "write --set train.steps=5"),
        (["--lr", "-1e-3"], "write --set optim.learning_rate=-1e-3"),
        (["--batch-size", "5"], "write --set train.batch_size=5"),
        (["--seed", "5"], "write --set data.seed=5 or --set train.seed=5"),
        (["--fp8"], "write --set precision.fp8=VALUE"),
        (["--config", "configs/tiny.py"], "the config stands by itself: write configs/tiny.py"),
        (["--config=configs/tiny.py"], "the config stands by itself: write configs/tiny.py"),
        (["--output-dir", "runs/x"], "write --workdir runs/x"),
        (["--workdri", "runs/x"], "did you mean --workdir?"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate; --help lists all"),
        (["x.py", "y.py"], "unrecognized arguments: y.py"),
    ],
)
def test_form_of_another_project_is_answered_with_the_right_one(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_keys_are_those_of_the_command(capsys):
    with pytest.raises(SystemExit):
        parse("--sequence-length", "128", kinds=(FineTuning,))
    assert capsys.readouterr().err.endswith("write --set sft.sequence_length=128\n")


def test_a_command_without_a_config_names_its_own_flags(capsys):
    parser = command.make_parser("x")
    commands = command.add_commands(parser, {"list": "all", "show": "one"})
    commands["show"].add_argument("--max-new-tokens", type=int)
    assert parser.parse_args(["show", "--max-new-tokens", "3"]).max_new_tokens == 3
    for argv, said in (
        (["show", "--max-tokens", "3"], "write --max-new-tokens 3"),
        (["list", "--max-new-tokens", "3"], "unrecognized arguments: --max-new-tokens; --help"),
        (["list", "--steps", "3"], "unrecognized arguments: --steps; --help lists all"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(argv)
        assert said in capsys.readouterr().err


def test_an_assignment_in_place_of_the_config_is_answered(capsys):
    def execute(arguments):
        command.load(arguments)

    parser = command.make_parser("x")
    command.add_config(parser, default="configs/tiny.py")
    assert command.run(parser, execute, ["train.steps=5"]) == 2
    assert "is not a config; keys of the config follow --set: write --set train.steps=5" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.stepz=5", "did you mean train.steps?"),
        ("train.steps=many", "must be a whole number"),
        ("train.steps=-5", "train.steps=-5"),
    ],
)
def test_wrong_assignment_is_wrong_usage(assignment, said, capsys):
    parser = command.make_parser("x")
    command.add_config(parser, default="configs/tiny.py")
    argv = ["--set", assignment]
    assert command.run(parser, lambda arguments: command.load(arguments) and None, argv) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(settings.WrongAssignment):
        command.load(parser.parse_args(argv))
