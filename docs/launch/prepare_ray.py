"""Prepares text on a Ray cluster: each task is one of the processes of `tools/prepare.py
--num-processes N --process-id I`.

At the end of a stage they wait for one another, so N is at most the cluster's cores: the tasks that
Ray has no core for would be waited for for ever, and are refused. A task whose machine is lost is
started elsewhere and goes on where it was. OUT is on a file system that all machines see, and dsjax
is installed on all of them.

Command: python docs/launch/prepare_ray.py RECIPE OUT N
Needs: pip install ray
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from dsjax.curate import prepare


@ray.remote(num_cpus=1, max_retries=3)
def work(recipe: str, out: Path, process: int, processes: int) -> None:
    loaded = prepare.recipe_of(recipe, (), "plain", ())
    prepare.prepare(loaded, out, workers=1, process=process, processes=processes)


def main(recipe: str, out: str, n_tasks: str) -> None:
    ray.init()
    tasks, cores = int(n_tasks), int(ray.cluster_resources().get("CPU", 0))
    if tasks > cores:
        sys.exit(f"{tasks} tasks do not run at the same time on {cores} cores; give {cores}")
    given = str(Path(recipe).resolve()), Path(out).resolve()
    ray.get([work.remote(*given, number, tasks) for number in range(tasks)])


if __name__ == "__main__":
    main(*sys.argv[1:])
