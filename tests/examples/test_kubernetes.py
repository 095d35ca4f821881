"""The Kubernetes manifest: valid for operator and cluster; its script forwards signals and distinguishes a stop."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fastuft.cli.commands import COMMANDS
from fastuft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job():
    return yaml.safe_load((ROOT / "examples" / "kubernetes" / "finetune.yaml").read_text())


def pod_template(job):
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]


@pytest.mark.peers
def test_the_kubeflow_model_accepts_every_field(job):
    models = pytest.importorskip("kubeflow.training.models")

    def read(value, model):
        """The value as the operator's OpenAPI model; unknown names are an error."""
        names = {key: field for field, key in model.attribute_map.items()}
        assert set(value) <= set(names), f"{model.__name__} has no {set(value) - set(names)}"
        kinds = {key: model.openapi_types[field] for key, field in names.items()}
        fields = {names[key]: deeper(part, kinds[key]) for key, part in value.items()}
        return model(**fields)

    def deeper(part, kind):
        if kind.startswith("dict(") and hasattr(models, kind[10:-1]):
            return {key: read(value, getattr(models, kind[10:-1])) for key, value in part.items()}
        return read(part, getattr(models, kind)) if hasattr(models, kind) and kind.startswith("Kubeflow") else part

    assert read(job, models.KubeflowOrgV1PyTorchJob).spec.elastic_policy.max_replicas == 4
    with pytest.raises(AssertionError, match="maxReplica"):
        read(job | {"spec": job["spec"] | {"elasticPolicy": {"maxReplica": 4}}}, models.KubeflowOrgV1PyTorchJob)


@pytest.mark.peers
def test_the_pods_are_valid(job):
    validate = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": pod_template(job)["spec"]}
    version = validate.latest_version()
    validate.validate(pod, version, strict=True)
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(pod, version, strict=True)


def test_mounts_have_volumes_and_the_container_name_is_pytorch(job):
    spec = pod_template(job)["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def start(job, folder, torchrun):
    """The container's script with a stand-in for torchrun and its run folder below ``folder``."""
    bin = folder / "bin"
    bin.mkdir()
    (bin / "torchrun").write_text(f"#!/bin/sh\n{torchrun}\n")
    (bin / "torchrun").chmod(0o755)
    out = folder / "photos"
    out.mkdir()
    container = pod_template(job)["spec"]["containers"][0]
    script = container["args"][0].replace("/runs/photos", str(out))
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"}
    return out, subprocess.Popen([*container["command"], script], env=environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize(("left", "ends", "status"), [("", 0, 0), ("stopped.json", 0, 85), ("", 3, 3)])
def test_the_exit_status_distinguishes_a_stop(job, tmp_path, left, ends, status):
    leave = f"touch {tmp_path}/photos/{left}; " if left else ""
    _, process = start(job, tmp_path, f"{leave}exit {ends}")
    assert process.wait(20) == status


def test_a_drain_signals_the_run_and_waits_for_its_checkpoint(job, tmp_path):
    saves = f"trap 'sleep 0.3; touch {tmp_path}/photos/stopped.json; exit 0' TERM; touch {tmp_path}/ready; "
    _, process = start(job, tmp_path, saves + "while :; do sleep 0.05; done")
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 85


def test_the_command_parses(job, monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "finetune", dataclasses.replace(COMMANDS["finetune"], run=lambda config: 0))
    script = pod_template(job)["spec"]["containers"][0]["args"][0].replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "fastuft.cli" in line)
    words = shlex.split(line.replace("$out", "/runs/photos").removesuffix("&"))
    assert main(words[words.index("fastuft.cli") + 1 :]) == 0, capsys.readouterr().err
