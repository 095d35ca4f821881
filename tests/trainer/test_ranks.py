"""Several processes of one run: results equal those of one, lost processes are detected, any number resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import ROOT, environment, finish, free_port, run, start, write_config
from torch.nn.parallel import DistributedDataParallel

from fastuft.data import Batch
from fastuft.runfolder import RunFolder, load_checkpoint
from fastuft.trainer import train
from fastuft.trainer.distributed import KeyShuffle, Ranks, start_ranks, stop_ranks
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.step import train_step

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def losses(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[row[n] for n in ("loss", "loss_q", "loss_m", "loss_alignment")] for row in found])


def state_of(folder):
    return load_checkpoint(RunFolder(folder).checkpoints.all()[0][1])


def assert_as_one(tiny, tmp_path, world_size, **changes):
    """A run of several processes equals that of one, up to rounding."""
    # Statistics over four images amplify rounding from step to step; a low rate keeps it rounding.
    base = {"model": {"bn": "split", "bn_group": 4}, "optim": {"epochs": 1, "lr": 0.005}, **changes}
    one = train(tiny(out=str(tmp_path / "one"), **base)).run_dir
    results = run(write_config(tiny(out=str(tmp_path / "many"), **base), tmp_path / "many.yaml"), world_size)
    assert [status for status, _ in results] == [0] * world_size, results
    torch.testing.assert_close(losses(one), losses(tmp_path / "many"), rtol=1e-4, atol=1e-5)
    left, right = state_of(one), state_of(tmp_path / "many")
    for part in ("model", "queue"):
        torch.testing.assert_close(left[part], right[part], rtol=1e-3, atol=1e-4)
    assert left["images"] == right["images"] and len(right["rank_buffers"]) == world_size
    assert sum("images; " not in output for _, output in results) >= world_size - 1  # one rank alone talks


@pytest.mark.e2e
@pytest.mark.parametrize("per", ["batch", pytest.param("pair", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tiny, tmp_path, per):
    assert_as_one(tiny, tmp_path, 2, method={"mix_per": per, "queue_size": 72})


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_four_processes_equal_one(tiny, tmp_path, mix):
    assert_as_one(tiny, tmp_path, 4, method={"mix": mix, "mix_per": "pair" if mix == "mixup" else "batch"})


def views(rank, local):
    generator = torch.Generator().manual_seed(7)
    query, key = torch.randn(2, 16, 3, 32, 32, generator=generator)
    mine = slice(rank * local, (rank + 1) * local)
    query, key = (v[mine].contiguous(memory_format=torch.channels_last) for v in (query, key))
    return Batch(query, key, torch.arange(local), torch.zeros(local, dtype=torch.bool), 0, 0)


def two_steps(rank, world_size, port, configs, path):
    """Two steps of one rank on given views, for each configuration: its final tensors and the buckets that it reduced."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = start_ranks("cpu", 60)
    for name, config in configs.items():
        learner, _ = build_learner(config, ranks)
        reduced = []
        if isinstance(learner.query, DistributedDataParallel):

            def count(seen, bucket):
                seen[-1].append(bucket.index())
                work = dist.all_reduce(bucket.buffer().div_(world_size), async_op=True)
                return work.get_future().then(lambda done: done.value()[0])

            learner.query.register_comm_hook(reduced, count)
        records = []
        for _ in range(2):
            reduced.append([])
            records.append(train_step(learner, views(rank, 16 // world_size), lambda part: None))
        state = {"weights": [p.detach() for p in learner.moco.parameters()], "queue": learner.queue.state_dict()}
        torch.save({**state, "records": torch.stack(records), "reduced": reduced}, f"{path}/{name}_{world_size}_{rank}")
    stop_ranks(ranks)


def assert_two_steps_are_those_of_one(configs, of_one, tmp_path):
    two_steps(0, 1, 0, of_one, tmp_path)
    mp.spawn(two_steps, (2, free_port(), configs, tmp_path), nprocs=2)
    for name in configs:
        one, *two = (torch.load(tmp_path / f"{name}_{rank}") for rank in ("1_0", "2_0", "2_1"))
        for part in ("weights", "queue"):
            torch.testing.assert_close(two[0][part], two[1][part], rtol=0, atol=0)
            torch.testing.assert_close(two[0][part], one[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((two[0]["records"] + two[1]["records"]) / 2, one["records"], rtol=1e-4, atol=1e-5)
        for rank in two:
            assert all(sorted(buckets) == list(range(len(buckets))) for buckets in rank["reduced"])
            assert len(rank["reduced"][1]) > 1  # DDP splits its one bucket after the first step


WIDE = {"bn": "split", "bn_group": 8, "head_dim": 8192}  # several buckets


def test_gradients_are_reduced_once_per_step_and_equal_those_of_one_process(tiny, tmp_path):
    methods = {"both": {}, "clean": {"mix": "none"}, "mixed": {"mix_only": True}}
    configs = {name: tiny(model=WIDE, method=method) for name, method in methods.items()}
    optim = {"optimizer": "adamw", "lr": 1e-4, "layer_decay": 0.8, "decay_norms": False}
    configs["recomputed"] = tiny(model=WIDE, optim=optim, runtime={"checkpoint_activations": True})
    assert_two_steps_are_those_of_one(configs, configs, tmp_path)


@pytest.mark.slow
def test_compiled_encoders_in_two_processes_equal_eager_in_one(tiny, tmp_path):
    compiled, eager = ({"both": tiny(model=WIDE, runtime={"compile": way})} for way in (True, False))
    assert_two_steps_are_those_of_one(compiled, eager, tmp_path)


def test_the_key_permutation_is_inverted():
    shuffle = KeyShuffle(Ranks(0, 1, torch.device("cpu")), seed=4)
    images = torch.randn(12, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    order = shuffle.permutation(1, 2, 12)
    scattered = shuffle.scatter(images, order)
    assert scattered.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(scattered, images)
    assert torch.equal(shuffle.restore(scattered, order), images)


def test_an_uneven_batch_is_refused(tiny, monkeypatch):
    for world_size, changes, message in (
        (3, {}, "does not divide over 3; choose a multiple of 3"),
        (16, {}, "leaves one image for each of 16 processes"),
        (2, {"model": {"bn": "split", "bn_group": 16}}, "does not divide the batch of one device, 8 images"),
    ):
        with pytest.raises(ValueError, match=message):
            build_learner(tiny(**changes), Ranks(0, world_size, torch.device("cpu")))


GOES_ASTRAY = """
import os
from fastuft.trainer import run
real = run.train_step
def astray(learner, batch, mark, **options):
    figures = real(learner, batch, mark, **options)
    if os.environ["RANK"] == "1" and (batch.epoch, batch.step) == (1, 1):
        CHANGE
    return figures
run.train_step = astray
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("figures = figures * float('nan')", "the loss is not finite at step 6 on rank 1; the last good checkpoint is"),
        (
            "learner.queue.keys[3, 0] += 1e-7",
            "the key queues of the processes differ at step 6; the last good checkpoint",
        ),
    ],
    ids=["loss", "queue"],
)
def test_a_diverging_rank_stops_all_before_a_checkpoint(tiny, tmp_path, change, message):
    config = tiny(runtime={"save_every": 3})
    results = run(write_config(config, tmp_path / "c.yaml"), 2, GOES_ASTRAY.replace("CHANGE", change))
    assert [status for status, _ in results] == [1, 1], results
    assert all(message in output and "step_00000003.pt" in output for _, output in results), results
    assert all("Traceback" not in output for _, output in results)
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints.all()] == [3]


DIES = """
import os, signal
from fastuft.trainer import run
real = run.train_step
def dies(learner, batch, mark, **options):
    if os.environ["RANK"] == "1" and (batch.epoch, batch.step) == (1, 1):
        os.kill(os.getpid(), signal.NUMBER)
    return real(learner, batch, mark, **options)
run.train_step = dies
"""


@pytest.mark.e2e
def test_a_killed_rank_stops_the_others_and_another_world_size_resumes(tiny, tmp_path):
    config = tiny(runtime={"timeout": 60.0, "save_every": 3}, data={"loader": "dali"})
    (survivor, output), (killed, _) = run(
        write_config(config, tmp_path / "c.yaml"), 2, DIES.replace("NUMBER", "SIGKILL")
    )
    assert killed == -9 and survivor == 1
    assert "lost contact with another process at step 5; the last good checkpoint is" in output
    assert "step_00000003.pt. Continue with resume=auto, on any number of processes" in output
    result = train(dataclasses.replace(config, resume="auto"))
    assert result.finished and result.steps == 8
    assert len(losses(result.run_dir)) == 8


@pytest.mark.slow
@pytest.mark.e2e
def test_a_hanging_rank_is_given_up_after_the_timeout(tiny, tmp_path):
    config = tiny(runtime={"timeout": 20.0, "save_every": 3})
    survivor, silent = start(write_config(config, tmp_path / "c.yaml"), 2, DIES.replace("NUMBER", "SIGSTOP"))
    try:
        output, _ = survivor.communicate(timeout=120)
    finally:
        silent.kill()
        silent.communicate()
    assert survivor.returncode == 1, output
    assert "lost contact with another process at step 5" in output and "step_00000003.pt" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.e2e
def test_torchrun_starts_the_ranks(tiny, tmp_path):
    arguments = write_config(tiny(max_steps=2), tmp_path / "c.yaml")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastuft.cli",
    ]
    done = subprocess.run([*launcher, *arguments], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = state_of(tmp_path / "run")
    assert state["global_step"] == 2 and len(state["rank_buffers"]) == 2


@pytest.mark.e2e
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tiny, tmp_path):
    config = tiny()
    started = start(write_config(config, tmp_path / "c.yaml"), 2, DIES.replace("NUMBER", "SIGTERM"))
    results = finish(started)
    assert [status for status, _ in results] == [85, 85], results
    assert state_of(tmp_path / "run")["global_step"] in (6, 7)  # within a step of the signal
