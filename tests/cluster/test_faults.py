"""What a run survives: kill -9 of a worker, of a node, of the driver; a cluster that shrinks."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.faults import Submitted

# The same steps on as many ranks: nothing may differ but the last bits.
SAME = {"rel": 1e-6}
STEPS_PER_EPOCH = 4  # the circle's 37 users in batches of 10


def test_a_run_ends_with_the_metrics_of_an_undisturbed_one_whatever_is_killed(
    tmp_path: Path, cycle_folder: Path
) -> None:
    draw = random.Random(0)
    epochs = 60
    config = faults.write_config(tmp_path, cycle_folder / "log.tsv", epochs=epochs)
    run_dir = tmp_path / "run"
    # In three parts of pretraining, somewhere; each kill meets a run that has gone on since.
    third = epochs * STEPS_PER_EPOCH // 3
    moments = [part * third + draw.randrange(third // 2) for part in range(3)]
    with faults.cluster_of(num_workers=2) as cluster:
        with Submitted(config, cluster.dashboard, "--workers", "2") as first:
            first.wait_for_step(moments[0])
            faults.kill_worker(cluster, draw.choice)
            first.wait_for("a second start", lambda: len(faults.logged(run_dir, "started")) == 2)
            first.wait_for_step(max(moments[1], faults.last_step(run_dir) + 1))
            faults.kill_node(cluster, draw.choice)
            first.wait_for("a third start", lambda: len(faults.logged(run_dir, "started")) == 3)
            first.wait_for_step(max(moments[2], faults.last_step(run_dir) + 1))
            faults.kill_driver(cluster, draw.choice)
            assert first.end() != 0
            assert "restart 2 of 3" in first.output
        with Submitted(config, cluster.dashboard, "--workers", "2") as again:
            assert again.end() == 0, again.output
            assert "pretrain: resumed at epoch" in again.output
    assert faults.world_sizes(run_dir) == [2]
    assert faults.metrics(run_dir) == {
        model: pytest.approx(values, **SAME)
        for model, values in faults.undisturbed(config, workers=2).items()
    }


def test_an_elastic_run_goes_on_with_fewer_workers_and_grows_back_with_its_cluster(
    tmp_path: Path, cycle_folder: Path
) -> None:
    config = faults.write_config(tmp_path, cycle_folder / "log.tsv", epochs=400)
    run_dir = tmp_path / "run"
    with (
        faults.cluster_of(num_workers=2) as cluster,
        Submitted(config, cluster.dashboard, "--workers", "1:2", "--resize-interval", "1") as job,
    ):
        job.wait_for_step(STEPS_PER_EPOCH)
        assert faults.world_sizes(run_dir) == [2]
        cluster.kill(cluster.workers[-1])
        job.wait_for("one worker", lambda: faults.world_sizes(run_dir) == [2, 1])
        job.wait_for_step(faults.last_step(run_dir) + 1)
        # The worker rests while a node comes, so that the run is not over before it is there.
        (worker,) = faults.train_workers(cluster.workers[0].process.pid)
        worker.send_signal(signal.SIGSTOP)
        cluster.add()
        worker.send_signal(signal.SIGCONT)
        job.wait_for("two again", lambda: faults.world_sizes(run_dir) == [2, 1, 2])
        job.wait_for_step(faults.last_step(run_dir) + 1)
