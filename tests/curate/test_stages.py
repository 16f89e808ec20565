"""Stages: the same files whatever the number of workers, and nothing done twice."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from dsjax.curate.stages import Stage, Workers, fingerprint
from dsjax.display import Display


def square(job, folder, number):
    (folder / f"{number}.txt").write_text(str(job**2))
    with open(folder.parent / "calls", "a") as stream:
        stream.write(f"{job}\n")
    return {"square": job**2}


def fail_once(job, folder, number):
    """Kills its own process at the first call for 3, as the system does when memory ends."""
    mark = folder.parent / "killed"
    if job == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(job, folder, number)


def refuse(job, folder, number):
    if job == 2:
        raise ValueError("job 2 is bad")
    return square(job, folder, number)


def run(out, function, jobs, *, workers=1, key="k", **which):
    out.mkdir(exist_ok=True)
    with Display(Console(quiet=True)) as display:
        with Workers(workers, out, display, **which) as pool:
            return pool.run(Stage("work/stage", function, jobs, key))


def calls(out):
    return sorted((out / "work" / "calls").read_text().split())


def content(out):
    folder = out / "work" / "stage"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_files_are_the_same_on_any_number_of_workers(tmp_path):
    for workers in (1, 2):
        found = run(tmp_path / str(workers), square, range(5), workers=workers)
        assert [part["square"] for part in found.found] == [0, 1, 4, 9, 16]
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_machines_share_the_work_in_any_order_of_their_start(tmp_path):
    run(tmp_path, square, [7, 8], key="another recipe")
    with ThreadPoolExecutor() as threads:
        later = threads.submit(run, tmp_path, square, range(5), process=1, processes=2)
        first = threads.submit(run, tmp_path, square, range(5), process=0, processes=2)
        assert later.result().found == first.result().found
    assert calls(tmp_path) == sorted([*"78", *"01234"])
    run(tmp_path / "alone", square, range(5))
    assert content(tmp_path) == content(tmp_path / "alone")


def test_finished_jobs_are_not_run_again(tmp_path):
    run(tmp_path, square, [1, 2, 3])
    (tmp_path / "work" / "stage" / "00001.json").unlink()
    assert run(tmp_path, square, [1, 2, 3]).resumed == 2
    assert calls(tmp_path) == ["1", "2", "2", "3"]


def test_another_key_begins_again(tmp_path):
    run(tmp_path, square, [1, 2, 3])
    found = run(tmp_path, square, [5], key="other")
    assert (found.resumed, set(content(tmp_path))) == (0, {"stage.json", "00000.json", "0.txt"})


def test_failed_job_keeps_the_others(tmp_path):
    with pytest.raises(ValueError, match="job 2 is bad"):
        run(tmp_path, refuse, [1, 2])
    assert run(tmp_path, square, [1, 2]).resumed == 1


@pytest.mark.heavy
def test_killed_worker_is_told_and_made_good(tmp_path):
    with pytest.raises(ChildProcessError, match="a worker process was killed in stage stage"):
        run(tmp_path, fail_once, range(6), workers=2)
    run(tmp_path, fail_once, range(6), workers=2)
    run(tmp_path / "calm", square, range(6))
    assert content(tmp_path) == content(tmp_path / "calm")


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "work" / "stage").mkdir(parents=True)
    (tmp_path / "work" / "stage" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds files of something else"):
        run(tmp_path, square, [1])


def test_fingerprint_tells_values_apart():
    assert fingerprint([1, "a"]) == fingerprint([1, "a"]) != fingerprint([1, "b"])
