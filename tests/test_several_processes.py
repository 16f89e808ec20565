"""Two processes of four devices: the run of one process of eight, through a signal, a kill, and a
resumption on another mesh.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsjax.train.throughput import TIMED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = 30
CONFIG = f"""
from dsjax.config import (
    Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
)

config = Config(
    name="several",
    model=ModelConfig(
        vocab_size=300, dim=16, n_layers=2, n_dense_layers=1, n_heads=2, inter_dim=32,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        n_shared_experts=1, n_activated_experts=2, moe_inter_dim=8, router_bias=True,
        norm_topk=True, n_mtp=1, max_seq_len=16, init_std=0.05,
    ),
    data=DataConfig(
        files="{{root}}/*.txt", heldout_fraction=0.2, sequence_length=16, cache_dir="{{root}}/cache"
    ),
    train=TrainConfig(
        steps={STEPS}, batch_size=16, micro_batch_size=8, log_every=1, eval_every=12,
        eval_sequences=12, checkpoint_every=4, sample_tokens=8, tensorboard=False,
    ),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    precision=PrecisionConfig(compute="float32"),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    words = ["attention", "latent", "expert", "router", "token", "balance", "of", "the", "a", "is"]
    for number in range(40):
        (root / f"{number}.txt").write_text(" ".join(rng.choice(words, size=80)))
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


def start(folder, run, *arguments, devices, **extra):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-u", str(ROOT / "tools" / "train.py"), str(folder / "config.py")]
    command += ["--workdir", str(folder / run), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment | {"XLA_FLAGS": flags} | extra, **pipes)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_two(folder):
    given = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    return [start(folder, "two", *given, str(i), devices=4) for i in range(2)]


def read_until(process, step):
    """Reads what a process prints up to the line of a step."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"ended with {process.wait()} before step {step}:\n{''.join(read)}")


def test_two_processes_are_one_run(folder):
    whole = start(folder, "one", devices=8)
    output, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, output

    # A signal to either process stops both after the same step, saved.
    first, second = start_two(folder)
    read_until(first, 5)
    second.send_signal(signal.SIGTERM)
    output, second_output = (process.communicate(timeout=300)[0] for process in (first, second))
    assert (first.returncode, second.returncode) == (143, 143), output + second_output
    saved = re.search(r"saved after step (\d+); to resume: python .*--process-id 0", output)
    assert saved and "step 1/" not in second_output and "Traceback" not in output

    # The kill of either ends the other, soon and with a reason.
    first, second = start_two(folder)
    read_until(first, 17)
    second.kill()
    begin = time.monotonic()
    output, _ = first.communicate(timeout=300)
    second.communicate()
    assert first.returncode == 1 and time.monotonic() - begin < 20
    assert "error: process 1 of 2 has ended, and process 0 cannot go on" in output
    assert "Start all 2 again with the same command" in output and "Traceback" not in output

    # Slurm starts them again, on another mesh.
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    mesh = ["--set", "mesh.data=4", "mesh.fsdp=2"]
    both = [start(folder, "two", *mesh, devices=4, **slurm, SLURM_PROCID=str(i)) for i in range(2)]
    output, second_output = (process.communicate(timeout=900)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], output + second_output
    resumed = re.search(rf"after step (\d+) of {STEPS}", output)
    assert resumed and int(resumed[1]) >= 16

    _assert_same_run(folder / "two", folder / "one")


def _assert_same_run(got, want):
    got_lines, want_lines = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (got, want)
    )
    assert len(got_lines) == len(want_lines) > STEPS
    for got_line, want_line in zip(got_lines, want_lines, strict=True):
        assert got_line.keys() == want_line.keys()
        for key in got_line.keys() - set(TIMED):
            # Sums over devices come in another order; thirty steps let that grow.
            assert abs(got_line[key] - want_line[key]) <= 1e-3 * abs(want_line[key]), (
                key,
                got_line,
            )
    summaries = [json.loads((run / "summary.json").read_text()) for run in (got, want)]
    for key in ("eval_loss", "bits_per_byte"):
        assert abs(summaries[0][key] / summaries[1][key] - 1) < 1e-3
    assert summaries[0]["sample"]["completion"]


def test_process_with_other_arguments_is_named(folder):
    arguments = ["--set", "train.seed=1", "--workdir", str(folder / "odd")]
    given = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    both = [
        start(folder, "odd", *given, str(i), *arguments[: 0 if i else 4], devices=4)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert any("the config of process 1 is not that of process 0" in output for output in outputs)


WAITING = """
import sys, time
from dsjax.parallel import processes

with processes.joined(sys.argv[1], 2, int(sys.argv[2])):
    print("joined", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def waiting():
    """Two processes that wait, as for a collective that never ends."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WAITING, f"localhost:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]
    for process in both:
        while process.stdout.readline() != "joined\n":
            assert process.poll() is None
    yield both
    for process in both:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_other_at_once_and_with_a_reason(waiting, killed):
    waiting[killed].kill()
    output, _ = waiting[1 - killed].communicate(timeout=8)  # less than any heartbeat takes
    assert waiting[1 - killed].returncode == 1
    assert f"error: process {killed} of 2 has ended, and process {1 - killed} cannot" in output


def test_process_that_falls_silent_ends_the_other(waiting):
    """Its connections stay open, as those of a host that vanishes from the network do."""
    waiting[1].send_signal(signal.SIGSTOP)
    output, _ = waiting[0].communicate(timeout=60)
    assert waiting[0].returncode == -signal.SIGABRT
    assert "stopped sending heartbeats" in output
