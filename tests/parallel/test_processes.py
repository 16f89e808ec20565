"""What one process can see of several; tests/test_several_processes.py starts two."""

import contextlib

import jax
import numpy as np
import pytest

from dsjax.parallel import processes


def test_one_process_agrees_with_itself():
    with processes.joined():
        assert processes.is_first()
        processes.wait("here")
        assert processes.from_first(7) == 7
        assert int(processes.highest(3)) == 3
        assert processes.json_from_first({"a": [1.5, None]}) == {"a": [1.5, None]}
        processes.check_same({"a": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("node1:99", None, None), r"--coordinator needs --num-processes and --process-id too"),
        (("node1:99", 2, None), r"needs --process-id too; give all three, or none"),
        (("node1:99", 2, 2), r"--process-id=2 must be at least 0 and below --num-processes=2"),
        (("node1:99", 2, -1), r"--process-id=-1 must be at least 0"),
    ],
)
def test_joining_refuses_half_of_the_arguments(arguments, message):
    with pytest.raises(ValueError, match=message), processes.joined(*arguments):
        pass


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:9",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "4",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # inside salloc, without srun
        (OPEN_MPI, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, False),
    ],
)
def test_cluster_with_several_processes_is_joined(environment, found, monkeypatch):
    for name in (*SLURM, *OPEN_MPI, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", _fail_to_meet)
    tried = pytest.raises(OSError, match="cannot join the cluster's processes")
    with tried if found else contextlib.nullcontext(), processes.joined():
        assert not found


def _fail_to_meet(*_, **__):
    raise RuntimeError("DEADLINE_EXCEEDED: after 300s")


def test_processes_that_do_not_meet_are_told_so(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", _fail_to_meet)
    expected = pytest.raises(OSError, match=r"cannot join the 2 processes at node1:99: DEADLINE")
    with expected, processes.joined("node1:99", 2, 1):
        raise AssertionError("joined")


def test_processes_that_were_given_something_else_are_named(monkeypatch):
    def gathered(own):
        return np.stack([own, own, own + np.array([0, 1], np.uint32)])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    with pytest.raises(ValueError, match=r"^the text of process 2 is not that of process 0"):
        processes.check_same({"the config": 1, "the text": 2})
