"""Ray and submitit themselves under experiments.curate. Oracle: the bytes of a run in one process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.curate import backends, run
from experiments.curate.config import Curate, Filter, Final, Slurm
from experiments.curate.plan import Input, Task
from tests.experiments.curate_runs import crawl, echo_or_die, tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return crawl(tmp_path_factory.mktemp("back_ends") / "crawl")


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    output = tmp_path_factory.mktemp("back_ends") / "whole"
    run.curate(config(web, output))
    return output


def config(web, output, **more):
    return Curate((f"{web}/*",), output, Filter(languages=("all",), rules="none"), final=Final(0.003), seed=3, **more)


@pytest.mark.slow
def test_submitit(web, whole, tmp_path):
    """Each job is a process of this machine."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    run.curate(config(web, tmp_path / "out", backend="slurm", slurm=Slurm(array=2)), executor)
    assert tree(tmp_path / "out") == tree(whole)
    assert len(list((tmp_path / "logs").glob("*_result.pkl"))) == 2 + 1 + 2 + 2  # of the four stages


def test_what_sbatch_is_asked_for(tmp_path, monkeypatch):
    """By a command of that name, which keeps the script."""
    pytest.importorskip("submitit")
    kept = tmp_path / "script"
    for name, text in {"sbatch": f'cp "$1" {kept}; echo Submitted batch job 7', "srun": "", "sacct": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executor = backends.slurm_executor(Slurm("cpu", 30, 3), 4, tmp_path / "logs")
    jobs = executor.map_array(str, range(9))
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", kept.read_text(), re.M))
    wanted = {"array": "0-8%4", "time": "30", "mem": "3GB", "cpus-per-task": "1", "partition": "cpu", "nodes": "1"}
    assert {name: options[name] for name in wanted} == wanted
    assert [job.job_id for job in jobs] == [f"7_{i}" for i in range(9)]


@pytest.fixture(scope="module")
def ray_started():
    """Once: it takes some seconds, and a process of its own for each of Ray's services."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")  # of its workers
        with backends.started_ray(None) as ray:
            yield ray


@pytest.mark.slow
def test_ray(web, whole, ray_started, tmp_path):
    run.curate(config(web, tmp_path / "out", backend="ray", workers=2))
    assert ray_started.is_initialized()  # it was before, so it is left as it was
    assert tree(tmp_path / "out") == tree(whole)


@pytest.mark.slow
def test_a_worker_of_rays_that_dies_is_named_and_the_others_go_on(ray_started):
    cfg = Curate(("x",), Path("out"))
    tasks = [Task(cfg, "filter", i, {}, (Input(f"in-{i}.warc.gz", 1, 0),)) for i in range(4)]
    told = []
    results = list(backends.run_ray(echo_or_die, tasks, 2, ray_started, lambda *more: told.append(more)))
    (dead,) = [x for x in results if x.error]
    assert dead.name == "filter in-2.warc.gz" and "worker died" in dead.error
    assert sorted(told) == [(0, 0), (1, 10), (1, 10), (1, 10)]


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.curate import backends, run
from tests.experiments.test_curate_back_ends import config

def killed(*args):
    yield next(whole(*args))
    os.kill(os.getpid(), signal.SIGKILL)

whole, backends.run_ray = backends.run_ray, killed
run.curate(config(Path(sys.argv[1]), Path(sys.argv[2]), backend="ray", workers=2))
"""


@pytest.mark.slow
def test_killed_under_ray_and_gone_on_with(web, whole, ray_started, tmp_path):
    """After the first of four inputs, while another worker is at the second."""
    output = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, web, output], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (output / "stages" / "filter").is_dir() and not (output / "counts.json").exists()
    run.curate(config(web, output, backend="ray", workers=2))
    assert tree(output) == tree(whole)
