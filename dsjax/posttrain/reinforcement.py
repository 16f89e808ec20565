"""A reinforcement-learning run: rollouts, rewards, updates; held-out accuracy; a summary."""

from __future__ import annotations

import math
from pathlib import Path

import jax
from rich.console import Console

from dsjax.config.reinforcement import Reinforcement
from dsjax.generate.sampling import Sampling
from dsjax.kernels.target import Target
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel import processes
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import make_mesh, regrouped
from dsjax.parallel.pipeline import PIPE
from dsjax.posttrain.answer import final
from dsjax.posttrain.evaluation import Sample, summarise
from dsjax.posttrain.experience import Experience, completion_text, row_length
from dsjax.posttrain.initial import Initial, all_but_mtp, open_initial
from dsjax.posttrain.policy import policy_objective
from dsjax.posttrain.problems import read_problems
from dsjax.posttrain.questions import Questions
from dsjax.posttrain.rewards import Grader
from dsjax.posttrain.rollout import Rollouts, casting, seeds
from dsjax.posttrain.updates import RENEW, PolicyState, Timed, all_minibatches, with_reference
from dsjax.posttrain.verdicts import FORMAT, Judged
from dsjax.precision.policy import advice
from dsjax.train import header, hyperparameters, loop, pipelined_step, session
from dsjax.train.batches import batch_sharding
from dsjax.train.optimizer import adamw
from dsjax.train.session import Session
from dsjax.train.step import abstract_state, compile_step, declared_model, scored_params, train_step


def learn(
    config: Reinforcement, folder: Path, *, command: str, console: Console | None = None
) -> int:
    """Learns from rewards in `folder`; arguments, result and errors are those of `session.run`."""
    initial = open_initial(config.init, run=folder)
    config = initial.fill(config)

    def recipe(under_way: Session) -> None:
        run = Learning(config, initial, under_way)
        loop.run_steps(
            under_way,
            run.updates,
            batch_size=lambda step: config.rl.prompts,
            knobs=run.knobs,
            evaluate=lambda: run.evaluate(config.train.eval_sequences),
            ahead=0,  # a rollout needs the new weights
        )
        if not under_way.exit_code:
            run.finish()

    return session.run(config, folder, recipe, command=command, console=console)


class Learning:
    """What reinforcement learning adds to a session."""

    def __init__(self, config: Reinforcement, initial: Initial, run: Session) -> None:
        """Reads questions, prepares programs, and begins the session.

        Raises:
          ValueError: config, problems, mesh, workdir or checkpoint do not fit; says what to do.
          OSError: a file cannot be read or written.
        """
        self.config, self.session, self.vocabulary = config, run, initial.vocabulary
        mesh, rl = make_mesh(config.mesh.sizes), config.rl
        # The first process judges, alone where there are several.
        alone = mesh if jax.process_count() == 1 else None
        self.grader = Grader(list(dict.fromkeys([*rl.rewards, FORMAT])), mesh=alone)
        questions = self._questions(rl.problems, "rl.problems", initial)
        self.heldout = self._questions(rl.heldout, "rl.heldout", initial) if rl.heldout else None
        length = row_length_of(config, questions, mesh)
        batch_sharding((config.micro_batch_size, length + 1), mesh)
        check_length(length, mesh)
        pipelined_step.check(config, mesh)
        if mesh.shape[PIPE] > 1 and config.replays:
            raise ValueError(
                f"rl.replay=on, and a pipeline (mesh.pipe={mesh.shape[PIPE]}) cannot replay the "
                "experts that generation chose; set rl.replay=off or mesh.pipe=1"
            )
        declared = declared_model(config.shape, config.precision)
        optimizer = adamw(config.optim, all_but_mtp)
        abstract = with_reference(
            declared, abstract_state(declared, optimizer, mesh), keep=rl.beta > 0
        )
        if slow := advice(config.precision.compute, Target.here()):
            run.display.say(slow)
        run.display.say(
            f"{len(questions):,} questions, {len(self.heldout) if self.heldout else 0:,} held out"
        )
        if processes.is_first():
            initial.keep_files(run.folder)
        self.rollouts = Rollouts(
            declared,
            stop_ids=initial.vocabulary.stop_ids,
            max_batch=rl.max_batch,
            speculative=rl.speculative,
            replay=config.replays,
            mesh=None if (sizes := config.rollout_mesh.sizes) is None else regrouped(mesh, sizes),
        )
        self._cast = casting(declared, mesh)
        source = Experience(
            config, questions, self.grader, self.rollouts, initial.vocabulary, declared, mesh,
            run.folder, run.display.say,
        )  # fmt: skip
        flops = train_flops_per_token(config.shape, length, mtp=False)
        run.display.console.print(
            header.table(
                config, declared, abstract, mesh, optimizer=optimizer, folder=run.folder,
                flops_per_token=flops,
                takes=f"{rl.prompts} questions, {rl.prompts * rl.group_size} answers of at most "
                f"{rl.max_new_tokens:,} tokens, {rl.minibatches} updates",
            )
        )  # fmt: skip
        run.begin(
            source,
            abstract,
            lambda: with_reference(
                declared, initial.state(declared, optimizer, mesh), keep=rl.beta > 0
            ),
            mesh=mesh,
            flops_per_token=flops,
        )
        objective = policy_objective(config)
        step = train_step(declared, optimizer, objective, schedule=config.mesh.schedule)
        self.updates = Timed(
            compile_step(
                all_minibatches(step, declared),
                abstract,
                mesh,
                what="the updates",
                display=run.display,
            )
        )

    def _questions(self, files: str, key: str, initial: Initial) -> Questions:
        if not files:
            raise ValueError(
                f"{key} is empty; give files of questions, such as {key}=problems/*.jsonl, with "
                'lines like {"prompt": "...", "answer": "..."}'
            )
        problems = read_problems(files, key=key)
        context = self.config.shape.max_seq_len
        rl = self.config.rl
        questions = Questions(problems, initial.vocabulary, initial.chat, rl, context=context)
        if processes.is_first():
            self.grader.check(problems)
        return questions

    def knobs(self, step: int) -> dict[str, float]:
        """Returns the knobs of a step, counted from 0."""
        train, every = self.config.train, self.config.rl.reference_every
        share = hyperparameters.progress(train, step)
        return {
            "learning_rate": hyperparameters.learning_rate(self.config.optim, step, share),
            "bias_update_speed": hyperparameters.bias_update_speed(train, share),
            RENEW: float(every > 0 and (step + 1) % every == 0),
        }

    def evaluate(self, most: int) -> dict[str, float]:
        """Answers at most `most` held-out questions, evenly spread, and judges the answers: shares
        of right ones as `dsjax.posttrain.evaluation` measures them, with the interval of pass@1.
        """
        if self.heldout is None:
            return {}
        rl, count = self.config.rl, min(most, len(self.heldout))
        numbers = [index * len(self.heldout) // count for index in range(count)]
        drawn, judged = self._answered(numbers, rl.eval_samples, rl.temperature)
        greedy, _ = self._answered(numbers, 1, 0.0)
        measured = summarise(drawn, (rl.eval_samples,), [one for (one,) in greedy])
        found = {f"eval_{name}": share.value for name, share in measured.items()}
        if "pass@1" in measured:
            interval = measured["pass@1"]
            found |= {"eval_pass@1_low": interval.low, "eval_pass@1_high": interval.high}
        means = judged.metrics()
        tokens = [each.tokens for one in drawn for each in one]
        return found | {
            "eval_reward": means["reward"],
            "eval_format": means["format"],
            "eval_length": sum(tokens) / len(tokens),
        }

    def _answered(
        self, numbers: list[int], n: int, temperature: float
    ) -> tuple[list[list[Sample]], Judged]:
        """Answers held-out questions n times each, with the same seeds every time."""
        assert self.heldout is not None
        state, heldout = self.session.state, self.heldout
        assert isinstance(state, PolicyState)
        each = [number for number in numbers for _ in range(n)]
        answers = self.rollouts.answer(
            self._cast(scored_params(state)),
            state.router,
            [heldout.prompts[number] for number in each],
            Sampling(temperature, self.config.rl.top_k, self.config.rl.top_p),
            seeds("evaluation", self.config.train.seed, 0, len(each)),
            self.config.rl.max_new_tokens,
        )
        texts = [completion_text(answer, self.vocabulary) for answer in answers]
        facts = [heldout.facts[number] for number in each]
        judged = Judged(self.config, self.grader, texts, facts, group=n)
        samples = [
            Sample(
                None if math.isnan(worth) else worth, final(text, fact), len(answer.tokens),
                answer.ended,
            )
            for worth, text, fact, answer in zip(
                judged.worth_QG.ravel().tolist(), texts, facts, answers, strict=True
            )
        ]  # fmt: skip
        return [samples[start : start + n] for start in range(0, len(samples), n)], judged

    def finish(self) -> None:
        """Evaluates on all held-out questions, and writes and shows summary.json."""
        run = self.session
        run.settle()
        found: dict[str, float] = {}
        if self.heldout is not None:
            run.display.say(f"answering all {len(self.heldout):,} held-out questions")
            found = self.evaluate(len(self.heldout))
        if run.interrupted() or run.metrics is None:
            return
        if found and "eval_reward" not in run.metrics.lines()[-1]:
            run.log_evaluation(found)
        logged = [line for line in run.metrics.lines() if "reward" in line]
        kept = ("reward", "right", "format", "length", "entropy", "engine_gap")
        ends = {f"{name}_first": logged[0].get(name) for name in kept}
        ends |= {f"{name}_last": logged[-1].get(name) for name in kept}
        run.finish(ends | found, compile_seconds=self.updates.seconds)


def row_length_of(config: Reinforcement, questions: Questions, mesh: jax.sharding.Mesh) -> int:
    """Returns the tokens per packed row, T.

    Raises:
      ValueError: rl.sequence_length has no room for the longest question and its answer.
    """
    needed = questions.longest + config.rl.max_new_tokens
    asked = config.rl.sequence_length
    if asked and asked + 1 < needed:
        raise ValueError(
            f"rl.sequence_length={asked} has no room for the longest question, of "
            f"{questions.longest} tokens, and rl.max_new_tokens={config.rl.max_new_tokens}; set it "
            f"to {needed - 1} or more, or to 0"
        )
    return asked or row_length(needed, mesh)
