"""The recipes for clusters can be read by what reads them, and agree with the page and torchrun."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"


def checked(words):
    """Return what torchrun makes of a command line; it ends the test where it knows a word not."""
    assert words[0] == "torchrun"
    return get_args_parser().parse_args(words[1:])


def test_slurm():
    path = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    command = re.search(r"srun (torchrun.*)\Z", text, re.S)[1].replace("\\\n", " ")
    command = command.replace("$SLURM_NNODES", options["nodes"]).replace("$first", "first")
    arguments = checked(shlex.split(command))
    assert arguments.nnodes == options["nodes"]
    assert arguments.nproc_per_node == options["gpus-per-node"]
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")
    assert arguments.training_script == "train.py"


def test_kubernetes():
    yaml = pytest.importorskip("yaml")  # comes with the documentation's tools
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    arguments = checked(container["command"])
    assert int(arguments.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(arguments.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, port = arguments.rdzv_endpoint.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
