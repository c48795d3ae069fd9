# SPDX-License-Identifier: Apache-2.0
"""launch/gke: manifests that Kubernetes' schemas accept, shaped as slices are, with arguments that arrive unchanged."""

import importlib.util
import json
import re
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.fake_cluster import HOSTILE, KUBECTL, Stage

RUN = ("--config=configs/llama8b.py", "--workdir=/runs/run")
CLAIM = "--claim=runs:/runs"
JOBSET = {
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object", "additionalProperties": False, "required": ["name"],
            "properties": {
                "name": {"type": "string"}, "namespace": {"type": "string"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "spec": {
            "type": "object", "additionalProperties": False, "required": ["replicatedJobs"],
            "properties": {
                "network": {
                    "type": "object", "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"}, "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                    },
                },
                "failurePolicy": {
                    "type": "object", "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object", "additionalProperties": False, "required": ["name", "action"],
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {"enum": [
                                        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
                                    ]},
                                    "onJobFailureReasons": {"type": "array", "items": {"enum": [
                                        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                        "MaxFailedIndexesExceeded", "PodFailurePolicy",
                                    ]}},
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array", "minItems": 1,
                    "items": {
                        "type": "object", "additionalProperties": False, "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"}, "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "additionalProperties": False, "properties": {
                                "spec": {"type": "object"}, "metadata": {"type": "object"}
                            }},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip
"""What of JobSet's API a manifest may hold; the template inside is a Job's and is held to Kubernetes' own schema."""


LOADED = importlib.util.spec_from_file_location("jobset", REPOSITORY / "launch" / "gke" / "jobset.py")
SCRIPT = importlib.util.module_from_spec(LOADED)
LOADED.loader.exec_module(SCRIPT)


def jobset(*options, run=RUN):
    """A manifest; where the run's directory is that of `RUN`, its place is claimed."""
    options = (*options, CLAIM) if RUN[-1] in run and CLAIM not in options else options
    return SCRIPT.render(*SCRIPT.parse([*options, "--", *run]))


def manifest(topology="v5p:4x4x4", *options, run=RUN):
    return yaml.safe_load(jobset("--name=pod", "--image=registry/image:1", f"--topology={topology}", *options, run=run))


def job_of(made):
    [replicated] = made["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(made):
    return job_of(made)["template"]["spec"]


def expanded(text, variables):
    """How Kubernetes reads arguments: `$(NAME)` is a variable where there is one, `$$` is `$`."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found.group() == "$$" else variables.get(found.group(1), found.group()),
        text,
    )


@pytest.mark.parametrize("options", [(), ("--slices=3", "--spot", "--queue=q", "--claim=c:/data", "--env=A=1")])
def test_the_schemas_accept_it(options):
    made = manifest("v6e:4x4", *options)
    jsonschema.validate(made, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pod-slice-0"}, "spec": job_of(made)}
    kubernetes_validate.validate(job, "1.33", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.33", strict=True)


@pytest.mark.parametrize(
    "topology,options,accelerator,hosts,chips",
    [
        ("v4:2x2x4", (), "tpu-v4-podslice", 4, 4),
        ("v5e:1x1", (), "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", (), "tpu-v5-lite-podslice", 2, 4),
        ("v5e:2x4", ("--chips-per-host=8",), "tpu-v5-lite-podslice", 1, 8),
        ("v5e:16x16", (), "tpu-v5-lite-podslice", 64, 4),
        ("v5p:4x4x4", (), "tpu-v5p-slice", 16, 4),
        ("v5p:8x8x16", (), "tpu-v5p-slice", 256, 4),
        ("v6e:16x16", (), "tpu-v6e-slice", 64, 4),
        ("tpu7x:4x4x8", (), "tpu7x", 32, 4),
    ],
)
def test_a_slice_has_a_pod_for_every_host(topology, options, accelerator, hosts, chips):
    made = manifest(topology, "--slices=2", *options)
    job, pod = job_of(made), pod_of(made)
    assert made["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}, "requests": {"google.com/tpu": chips}}


def test_pods_find_each_other_and_know_their_slice():
    one, two = manifest(), manifest("v5p:4x4x4", "--slices=2")
    assert two["spec"]["network"] == {
        "enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": "pod"
    }  # fmt: skip
    assert pod_of(two)["subdomain"] == "pod"
    annotations = two["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert pod_of(one)["containers"][0]["env"] == []
    env = {entry["name"]: entry for entry in pod_of(two)["containers"][0]["env"]}
    assert env["MEGASCALE_NUM_SLICES"]["value"] == "2"
    field = env["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['jobset.sigs.k8s.io/job-index']"
    # JobSet's name for the first pod of the first child job: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN
    first = "{}-{}-0-0.{}".format("pod", two["spec"]["replicatedJobs"][0]["name"], two["spec"]["network"]["subdomain"])
    assert env["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == first


def test_a_stop_leaves_time_to_save_and_starts_again_and_wrong_input_does_not():
    made = manifest("v5p:2x2x1", "--max-restarts=7", "--grace-seconds=90")
    policy, job, pod = made["spec"]["failurePolicy"], job_of(made), pod_of(made)
    assert policy["maxRestarts"] == 7 and pod["terminationGracePeriodSeconds"] == 90
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert pod_of(manifest())["terminationGracePeriodSeconds"] >= 300
    [rule] = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    [refused] = job["podFailurePolicy"]["rules"]
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]}


def test_every_argument_arrives_as_it_was_typed():
    """Through YAML, and through Kubernetes' own expansion of `$(NAME)`."""
    hostile = (*RUN, *HOSTILE, "$(MEGASCALE_NUM_SLICES) $$(A)", "null", "1e3", "\u2028\x85\x7f\x01\ufeff", "- a: b")
    made = manifest("v5p:4x4x4", "--slices=2", "--env=A=$(MEGASCALE_SLICE_ID) 'x'\n\"y\"", run=hostile)
    [container] = pod_of(made)["containers"]
    variables = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0", "A": "a", "HOME": "/root"}
    assert tuple(expanded(argument, variables) for argument in container["args"]) == hostile
    values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert expanded(values["A"], variables) == "$(MEGASCALE_SLICE_ID) 'x'\n\"y\""
    assert "command" not in container  # the image's entry point passes a SIGTERM on


def test_a_run_in_a_bucket_needs_no_claim():
    run = ("--config=configs/tiny.py", "--workdir=gs://bucket/runs/x")
    assert "persistentVolumeClaim" not in json.dumps(manifest("v5e:4x4", run=run))


def test_spot_nodes_queues_and_claims():
    run = ("--config=configs/tiny.py", "--workdir=/data/runs/x")
    made = manifest("v5e:4x4", "--spot", "--queue=team", "--claim=training-data:/data", run=run)
    pod = pod_of(made)
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"google.com/tpu", "cloud.google.com/gke-spot"} == {entry["key"] for entry in pod["tolerations"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    [claim] = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claim["persistentVolumeClaim"] == {"claimName": "training-data"} and mounts[claim["name"]] == "/data"


@pytest.mark.parametrize(
    "options,run,message",
    [
        (("--topology=v9:2x2",), RUN, "--topology=v9:2x2: no such kind of TPU; one of v4 v5e v5p v6e tpu7x"),
        (("--topology=v5p:4x4",), RUN, "v5p has 3 dimensions, such as 4x4x4"),
        (("--topology=v5e:3x3",), RUN, "9 chips do not divide into hosts of 4"),
        (("--name=Pod",), RUN, "--name=Pod: lower-case"),
        (("--name=" + "a" * 60,), RUN, "within 63"),
        (("--name=a: b",), RUN, "--name=a: b: lower-case"),
        (("--namespace=a\nb",), RUN, "--namespace=a"),
        (("--slices=0",), RUN, "--slices=0: 1 at least"),
        (("--env=A",), RUN, "--env=A: NAME=VALUE"),
        (("--claim=data",), RUN, "--claim=data: CLAIM:/PATH"),
        ((), (), "--workdir=: a run goes on from its directory"),
        ((), ("--workdir", "runs/x"), "--workdir=runs/x: a run goes on from its directory"),
        (("--claim=data:/data",), ("--workdir=/database/x",), "--workdir=/database/x: lies in the pod"),
        ((), (*RUN, b"\xff".decode(errors="surrogateescape")), "not UTF-8"),
    ],
)
def test_wrong_input_stops_with_words(options, run, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        jobset("--name=pod", "--image=i", "--topology=v5p:4x4x4", *options, run=run)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.startswith("error: ")


def test_it_is_handed_to_kubectl(tmp_path):
    stage = Stage(tmp_path / "stage", REPOSITORY, kubectl=KUBECTL)
    options = ("--name=pod", "--image=i", "--topology=v5e:2x2", "--namespace=team", CLAIM)
    said = stage.run(sys.executable, "launch/gke/jobset.py", *options, "--", *RUN).stderr
    assert stage.calls("kubectl") == [["apply", "--namespace=team", "--filename=-"]]
    given = (stage.path / "manifest").read_text()
    assert given == jobset(*options) and given in said and "+ kubectl apply" in said
    dry = stage.run(sys.executable, "launch/gke/jobset.py", *options, "--dry-run", "--", *RUN)
    assert dry.stdout == given and len(stage.calls("kubectl")) == 1
    stage.write("exits", "3\n")
    stage.run(sys.executable, "launch/gke/jobset.py", *options, "--", *RUN, code=3)
    (stage.programs / "kubectl").unlink()
    nowhere = {"code": 2, "PATH": str(stage.programs)}
    said = stage.run(sys.executable, "launch/gke/jobset.py", *options, "--", *RUN, **nowhere).stderr
    assert "kubectl was not found" in said
