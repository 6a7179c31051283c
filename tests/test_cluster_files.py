"""The SLURM script and the Kubernetes manifest: every word of them is known there."""

import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from jlora.sharding._distributed import VARIABLES, place_of

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
SLURM, JOBSET = CLUSTER / "slurm.sh", CLUSTER / "jobset.yaml"

# Options of `sbatch`, with what their values look like (https://slurm.schedmd.com).
NUMBER, WORD = r"\d+", r"[\w.%-]+"
SBATCH = {
    "job-name": WORD,
    "nodes": NUMBER,
    "ntasks": NUMBER,
    "ntasks-per-node": NUMBER,
    "gpus-per-node": rf"(\w+:)?{NUMBER}",
    "gpus-per-task": rf"(\w+:)?{NUMBER}",
    "cpus-per-task": NUMBER,
    "mem": rf"{NUMBER}[KMGT]?",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "partition": WORD,
    "account": WORD,
    "output": r"[\w./%-]+",
    "error": r"[\w./%-]+",
    "open-mode": "append|truncate",
    "signal": r"([RB]+:)?(TERM|USR1|INT|\d+)(@\d+)?",
    "requeue": "",
    "exclusive": "",
}


def test_slurm_knows_each_directive():
    lines = SLURM.read_text().splitlines()
    found = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, x in enumerate(lines) if x and x[0] != "#")
    assert lines.index(found[-1]) < first_command  # those behind it are not read
    given = {}
    for line in found:
        name, value = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups("")
        assert re.fullmatch(SBATCH[name], value), line
        assert name not in given
        given[name] = value
    # A process for each GPU, as JAX has it on SLURM.
    assert given["ntasks-per-node"] == given["gpus-per-node"]


def fake(folder, **programs):
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_slurm_script_begins_and_goes_on(tmp_path):
    subprocess.run(["bash", "-n", SLURM], check=True)
    environment = fake(tmp_path, srun='echo "$@"')

    def said(*words):
        command = ["bash", SLURM, *map(str, words)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )

    run = tmp_path / "run"
    new = said("my.toml", "--output", run, "--rank", 4).stdout
    srun = "--kill-on-bad-exit=1 jlora train"
    assert new.strip() == (
        f"{srun} my.toml --output {run} --overwrite --distributed auto --rank 4"
    )
    (run / "state").mkdir(parents=True)
    again = said("my.toml", "--output", run).stdout
    assert again.strip() == f"{srun} --resume {run} --distributed auto"
    assert (said("my.toml").returncode, said().returncode) == (2, 2)


# ------------------------------------------------------------------------- Kubernetes


def closed(required=(), **properties):
    """An object of these fields alone."""
    return {"type": "object", "properties": properties, "required": list(required),
            "additionalProperties": False}  # fmt: skip


def listed(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
LABEL = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
NAMED = {"type": "object", "additionalProperties": TEXT}
METADATA = closed(name=LABEL, namespace=LABEL, labels=NAMED, annotations=NAMED)
ENV = closed(
    ["name"],
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value=TEXT,
    valueFrom=closed(fieldRef=closed(["fieldPath"], fieldPath=TEXT, apiVersion=TEXT)),
)
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
CONTAINER = closed(
    ["name", "image"],
    name=LABEL,
    image=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    env=listed(ENV),
    ports=listed(closed(["containerPort"], containerPort=COUNT, name=LABEL)),
    resources=closed(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=listed(
        closed(["name", "mountPath"], name=LABEL, mountPath=TEXT, readOnly=FLAG)
    ),
    workingDir=TEXT,
)
VOLUME = closed(
    ["name"],
    name=LABEL,
    persistentVolumeClaim=closed(["claimName"], claimName=LABEL, readOnly=FLAG),
    emptyDir=closed(medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
POD = closed(
    ["containers", "restartPolicy"],
    restartPolicy={"enum": ["Never", "OnFailure"]},  # of a Job; not Always
    terminationGracePeriodSeconds=COUNT,
    containers=listed(CONTAINER),
    volumes=listed(VOLUME),
    nodeSelector=NAMED,
    serviceAccountName=LABEL,
)
JOB = closed(
    ["template"],
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    template=closed(["spec"], metadata=METADATA, spec=POD),
)
# Of the CRD jobset.x-k8s.io/v1alpha2, all fields of a JobSet's specification.
SPEC = closed(
    coordinator=closed(
        ["replicatedJob"], replicatedJob=TEXT, jobIndex=COUNT, podIndex=COUNT
    ),
    failurePolicy=closed(
        maxRestarts=COUNT,
        restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
        rules=listed({"type": "object", "required": ["name", "action"]}),
    ),
    managedBy=TEXT,
    network=closed(
        enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG, subdomain=LABEL
    ),
    replicatedJobs=listed(
        closed(
            ["name", "template"],
            name=LABEL,
            groupName=LABEL,
            replicas=COUNT,
            template=closed(["spec"], metadata=METADATA, spec=JOB),
            dependsOn=listed(closed(["name", "status"], name=LABEL, status=TEXT)),
        )
    ),
    startupPolicy=closed(["startupPolicyOrder"], startupPolicyOrder=TEXT),
    successPolicy=closed(
        ["operator"], operator=TEXT, targetReplicatedJobs=listed(TEXT)
    ),
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
    volumeClaimPolicies=listed({"type": "object"}),
)
SCHEMA = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=SPEC,
)


@pytest.fixture
def jobset():
    return yaml.safe_load(JOBSET.read_text())


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_manifest_has_the_fields_of_a_jobset(jobset):
    check = jsonschema.Draft202012Validator(SCHEMA)
    check.validate(jobset)
    pod_of(jobset)["container"] = pod_of(jobset).pop("containers")
    assert not check.is_valid(jobset)


def test_the_pods_of_a_jobset_meet(jobset, monkeypatch):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], pod_of(jobset)
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    for variable in container["env"]:
        # The index of the pod, from a field, is that of the last one here.
        monkeypatch.setenv(
            variable["name"], variable.get("value", str(spec["completions"] - 1))
        )
    assert {variable["name"] for variable in container["env"]} == set(VARIABLES)
    place = place_of("auto")
    assert place.count == spec["completions"]
    name = jobset["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    # As JobSet names pods: JOBSET-JOB-REPLICA-INDEX, below a service JOBSET.
    assert place.address == f"{name}-{job['name']}-0-0.{name}:{port}"
    assert {m["name"] for m in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


TRAIN = """
echo "$@" > "$0.words"
trap 'exit 0' TERM
if [ -n "$DONE" ]; then touch {run}/report.md; exit 0; fi
sleep 60 & wait
"""


def test_a_pod_that_was_stopped_fails_and_goes_on(jobset, tmp_path):
    """So that it begins again, where a pod that ends with 0 would not."""
    (container,) = pod_of(jobset)["containers"]
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    script = container["args"][0].replace("/shared", str(tmp_path))
    command = [*container["command"], script]
    environment = fake(tmp_path, jlora=TRAIN.format(run=run))
    pod = subprocess.Popen(command, env=environment)
    words = tmp_path / "jlora.words"
    while not words.exists() or not words.read_text():
        pod.poll()
    pod.terminate()
    assert pod.wait(timeout=10) == 1
    assert f"my.toml --output {run} --overwrite --distributed auto" in words.read_text()
    (run / "state").mkdir()
    subprocess.run(command, env={**environment, "DONE": "1"}, check=True, timeout=10)
    assert words.read_text().split() == [
        "train", "--resume", str(run), "--distributed", "auto",
    ]  # fmt: skip
