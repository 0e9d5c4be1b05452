"""The files that clusters are made of: against the schemas that reject them, and this project."""

from __future__ import annotations

import copy
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import torchrec_pt
from cluster import submit
from cluster.serve_replica import ServeArgs

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
RAY_UP = ["ray_up.yaml", "ray_up_aws.yaml"]
DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.cuda"]
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())

Manifest = dict[str, Any]


def kubernetes(name: str) -> Manifest:
    return dict(yaml.safe_load((ROOT / "cluster/kubernetes" / name).read_text()))


def ray_up(name: str) -> Manifest:
    return dict(yaml.safe_load((ROOT / "cluster" / name).read_text()))


def check_kubernetes(manifest: Manifest) -> None:
    """
    Raises:
        jsonschema.ValidationError: no manifest of its kind.
    """
    one_kind = {**SCHEMA, "$ref": f"#/$defs/{manifest['kind']}"}
    del one_kind["oneOf"]
    jsonschema.validate(manifest, one_kind, jsonschema.Draft202012Validator)


def check_ray_up(config: Manifest) -> None:
    """As `ray up` does before it starts anything."""
    validate_config(prepare_config(copy.deepcopy(config)))


def cluster_spec(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


def pods(manifest: Manifest) -> Iterator[Manifest]:
    spec = cluster_spec(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def pinned(requirements: str, package: str) -> str:
    text = (ROOT / "requirements" / requirements).read_text()
    found = re.search(rf"^{package}(\[\S*\])?==(\S+)$", text, re.MULTILINE)
    assert found is not None
    return found[2]


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_kubernetes_manifests_are_of_their_schemas(name: str) -> None:
    check_kubernetes(kubernetes(name))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_its_files(name: str) -> None:
    check_ray_up(ray_up(name))


def head(manifest: Manifest) -> Manifest:
    return dict(cluster_spec(manifest)["headGroupSpec"])


def container(manifest: Manifest) -> Manifest:
    first: Manifest = next(pods(manifest))["containers"][0]
    return first


MUTATIONS: dict[str, tuple[str, Callable[[Manifest], object]]] = {
    "a misspelt field": ("raycluster.yaml", lambda m: m["spec"].update(rayversion="2.60.0")),
    "a number for a string": ("raycluster.yaml", lambda m: m["spec"].update(rayVersion=2.6)),
    "a number in rayStartParams": (
        "raycluster.yaml",
        lambda m: head(m)["rayStartParams"].update({"num-cpus": 0}),
    ),
    "no head": ("raycluster.yaml", lambda m: m["spec"].pop("headGroupSpec")),
    "a kind of service that is none": (
        "raycluster.yaml",
        lambda m: m["spec"]["headGroupSpec"].update(serviceType="Loadbalancer"),
    ),
    "a quantity that is none": (
        "rayjob.yaml",
        lambda m: container(m)["resources"]["limits"].update(memory="8 GB"),
    ),
    "replicas in words": (
        "rayjob.yaml",
        lambda m: cluster_spec(m)["workerGroupSpecs"][0].update(replicas="one"),
    ),
    "the API of before": ("rayjob.yaml", lambda m: m.update(apiVersion="ray.io/v1alpha1")),
    "a field of another kind": ("rayservice.yaml", lambda m: m["spec"].update(entrypoint="true")),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_manifest_is_rejected(mutation: str) -> None:
    name, change = MUTATIONS[mutation]
    manifest = kubernetes(name)
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(manifest)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(head_start_commands=[]),
        lambda c: c.update(max_workers="four"),
        lambda c: c["auth"].update(ssh_key="~/.ssh/id"),
        lambda c: c["docker"].update(images=[]),
    ],
)
def test_a_wrong_ray_up_file_is_rejected(change: Callable[[Manifest], object]) -> None:
    config = ray_up("ray_up_aws.yaml")
    change(config)
    with pytest.raises(jsonschema.ValidationError):
        check_ray_up(config)


# --- what they say is what the project is -------------------------------------------------------


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_cluster_runs_the_ray_that_is_pinned(name: str) -> None:
    assert cluster_spec(kubernetes(name))["rayVersion"] == pinned("base.txt", "ray")


def images() -> Iterator[str]:
    for name in KUBERNETES:
        yield from (one["image"] for pod in pods(kubernetes(name)) for one in pod["containers"])
    for name in RAY_UP:
        yield from (value for key, value in ray_up(name)["docker"].items() if "image" in key)
    for name in DOCKERFILES:
        # The tag by which a Dockerfile says to build it.
        yield from re.findall(r"-t (\S+) \.", (ROOT / "cluster/docker" / name).read_text())


def test_all_of_them_name_the_images_of_this_version() -> None:
    repository = "registry.example.com/torchrec-pt"
    version = torchrec_pt.__version__
    assert set(images()) == {f"{repository}:{version}-cpu", f"{repository}:{version}-cuda"}


@pytest.mark.parametrize("name", KUBERNETES)
def test_gpus_are_asked_for_where_the_image_has_their_kernels(name: str) -> None:
    for pod in pods(kubernetes(name)):
        for one in pod["containers"]:
            requests, limits = one["resources"]["requests"], one["resources"]["limits"]
            assert requests == limits  # Ray takes the limits for what the node has
            assert {"cpu", "memory"} <= limits.keys()
            assert ("nvidia.com/gpu" in limits) == one["image"].endswith("-cuda")


@pytest.mark.parametrize("name", KUBERNETES)
def test_nobody_outside_reaches_a_cluster_and_nobody_without_a_token(name: str) -> None:
    manifest = kubernetes(name)
    assert cluster_spec(manifest)["authOptions"] == {"mode": "token"}
    assert head(manifest)["serviceType"] == "ClusterIP"
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"]
        for one in pod["containers"]:
            assert not one["securityContext"]["allowPrivilegeEscalation"]
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", RAY_UP)
def test_the_dashboard_of_ray_up_listens_on_loopback(name: str) -> None:
    start = ray_up(name)["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)


@pytest.mark.parametrize("name", KUBERNETES)
def test_every_volume_that_is_mounted_is_there(name: str) -> None:
    for pod in pods(kubernetes(name)):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for one in pod["containers"]:
            assert {mount["name"] for mount in one["volumeMounts"]} == volumes


def test_the_job_has_the_cluster_of_raycluster_yaml_and_the_configuration_besides() -> None:
    job, cluster = cluster_spec(kubernetes("rayjob.yaml")), kubernetes("raycluster.yaml")["spec"]
    pod = job["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"].pop(0) == {"name": "run", "configMap": {"name": "torchrec-pt-run"}}
    (one,) = pod["containers"]
    mount = {"name": "run", "mountPath": "/etc/torchrec_pt", "readOnly": True}
    assert one["volumeMounts"].pop() == mount
    assert job == cluster


def test_the_entrypoint_is_a_submission_to_the_head_that_it_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = kubernetes("rayjob.yaml")
    python, m, module, config, *options = shlex.split(job["spec"]["entrypoint"])
    assert [python, m, module] == ["python", "-m", "cluster.submit"]
    (mount,) = (one for one in container(job)["volumeMounts"] if one["name"] == "run")
    assert Path(config).parent == Path(mount["mountPath"])
    ports = {port["name"]: port["containerPort"] for port in container(job)["ports"]}
    address = f"http://127.0.0.1:{ports['dashboard']}"
    assert address in options

    # The words as they are, for a configuration that is here and to where nobody listens: what
    # submit does not know, it would refuse before it looks for the cluster.
    run = tmp_path / "run.toml"
    run.write_text('run_dir = "/runs/a"\n[data]\nformat = "tsv"\npath = "/log.tsv"\n')
    words = ["http://127.0.0.1:1" if word == address else word for word in options]
    monkeypatch.setattr("sys.argv", ["cluster.submit", str(run), *words])
    with pytest.raises(SystemExit) as stop:
        submit.main()
    assert stop.value.code == 2
    assert "is it the dashboard's address?" in capsys.readouterr().err


def test_the_service_names_an_application_and_gives_it_what_it_takes() -> None:
    config = yaml.safe_load(kubernetes("rayservice.yaml")["spec"]["serveConfigV2"])
    jsonschema.validate(config, {**SCHEMA["$defs"]["ServeConfig"], "$defs": SCHEMA["$defs"]})
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    args = serve_args_type(build).model_validate(application["args"])
    (mount,) = container(kubernetes("rayservice.yaml"))["volumeMounts"]
    assert args.folder.is_relative_to(mount["mountPath"])


def serve_args_type(build: Callable[..., object]) -> type[ServeArgs]:
    """What Ray Serve reads from the builder, and makes of the arguments."""
    (found,) = (kind for name, kind in get_type_hints(build).items() if name != "return")
    assert issubclass(found, ServeArgs)
    return found


# --- the images ---------------------------------------------------------------------------------


def instructions(name: str) -> list[tuple[str, str]]:
    """(FROM, …), (RUN, …) of a Dockerfile, its continued lines joined, without comments."""
    text = (ROOT / "cluster/docker" / name).read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [
        (word, rest)
        for line in joined.splitlines()
        if line
        for word, _, rest in [line.partition(" ")]
    ]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_of_pinned_packages_and_runs_as_a_user(name: str) -> None:
    steps = instructions(name)
    assert all(re.search(r":\S*\d+\.\d+", rest) for word, rest in steps if word == "FROM")
    installed = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    required = {one for rest in installed for one in re.findall(r"-r (\S+)", rest)}
    device = name.partition(".")[2]
    assert required == {f"requirements/{one}.txt" for one in ("torch", device, "base", "tune")}
    assert all((ROOT / one).is_file() for one in required)
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    assert not any(word in ("ADD", "EXPOSE") for word, _ in steps)
    for word, rest in steps:
        if word == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])


def test_both_images_have_the_python_of_one_ubuntu() -> None:
    last = [
        [rest for word, rest in instructions(name) if word == "FROM"][-1] for name in DOCKERFILES
    ]
    assert last == ["ubuntu:24.04", "nvidia/cuda:13.0.1-base-ubuntu24.04"]


def test_the_cuda_image_compiles_for_the_architectures_of_setup_py() -> None:
    archs = re.search(r'^CUDA_ARCHS = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert archs is not None
    assert ("ARG", f'TORCH_CUDA_ARCH_LIST="{archs[1]}"') in instructions("Dockerfile.cuda")


def test_what_an_image_needs_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert "**/*.so" in ignored  # compiled here, for another Python
    for name in DOCKERFILES:
        for word, rest in instructions(name):
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert any(line.startswith(f"!{source}") for line in ignored)
