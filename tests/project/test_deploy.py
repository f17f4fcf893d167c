"""``examples/deploy``: files that a cluster takes, with variables, options and commands that there are.

The schemas of Kubernetes (``kubernetes-validate``) and of compose files (``check-jsonschema``) take more
than 100 MB and are used where they are (``make test-beside``); otherwise the keys are those listed
here by hand, which were checked with both, and with the chart's own ``values.schema.json`` (vLLM's
production stack, chart 0.1.12).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from places import ROOT

from vllm_vlora.checkpoint.pinning import split_pin
from vllm_vlora.tools.cli import app
from vllm_vlora.urls import is_remote

jsonschema = pytest.importorskip("jsonschema")
DEPLOY = ROOT / "examples" / "deploy"
KUBERNETES = [*yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())]
CLAIM, DEPLOYMENT, SERVICE = KUBERNETES
POD = DEPLOYMENT["spec"]["template"]["spec"]
(FIRST,), (SERVER,) = POD["initContainers"], POD["containers"]
VALUES = yaml.safe_load((DEPLOY / "production-stack.yaml").read_text())
(MODEL,) = VALUES["servingEngineSpec"]["modelSpec"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
COMPOSED = COMPOSE["services"]["server"]
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
TEXTS = {"type": "array", "items": TEXT}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


NAMED = closed("name value", name=TEXT, value=TEXT)
PORT = {"type": ["integer", "string"]}
LABELS = {"type": "object", "additionalProperties": TEXT}
META = closed("name", name=TEXT, labels=LABELS)
PROBE = closed(
    httpGet=closed("path port", path=TEXT, port=PORT),
    exec=closed("command", command=TEXTS),
    **dict.fromkeys(
        ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"), WHOLE
    ),
)
CONTAINER = closed(
    "name image",
    name=TEXT,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    env=many(NAMED),
    envFrom=many(closed(secretRef=closed("name", name=TEXT))),
    ports=many(closed("containerPort", name=TEXT, containerPort=WHOLE)),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=closed(requests=LABELS, limits=LABELS),
    volumeMounts=many(closed("name mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = closed(
    "name",
    name=TEXT,
    persistentVolumeClaim=closed("claimName", claimName=TEXT),
    emptyDir=closed(medium=TEXT, sizeLimit=TEXT),
)
POD_SCHEMA = closed(
    "containers",
    initContainers=many(CONTAINER),
    containers=many(CONTAINER),
    volumes=many(VOLUME),
)
SCHEMAS = {
    "PersistentVolumeClaim": closed(
        "accessModes resources",
        accessModes=many({"enum": ["ReadWriteMany", "ReadWriteOnce"]}),
        resources=closed(requests=LABELS),
    ),
    "Deployment": closed(
        "selector template",
        replicas=WHOLE,
        selector=closed(matchLabels=LABELS),
        template=closed(metadata=closed(labels=LABELS), spec=POD_SCHEMA),
    ),
    "Service": closed(
        "selector ports",
        selector=LABELS,
        ports=many(closed("port", name=TEXT, port=WHOLE, targetPort=PORT)),
    ),
}
# Of the chart's values those that are used, under the names of its schema.
CHART = closed(
    "servingEngineSpec",
    servingEngineSpec=closed(
        "modelSpec",
        startupProbe=PROBE,
        modelSpec=many(
            closed(
                "name repository tag modelURL replicaCount requestCPU requestMemory requestGPU",
                **dict.fromkeys(
                    ("name", "repository", "tag", "modelURL", "requestMemory", "pvcStorage"), TEXT
                ),
                **dict.fromkeys(("replicaCount", "requestCPU", "requestGPU"), WHOLE),
                pvcAccessMode=TEXTS,
                enableLoRA={"type": "boolean"},
                vllmConfig=closed(
                    enablePrefixCaching={"type": "boolean"}, maxLoras=WHOLE, extraArgs=TEXTS
                ),
                envFromSecret=closed("name", name=TEXT),
                env=many(NAMED),
                initContainer=closed(
                    "name image",
                    name=TEXT,
                    image=TEXT,
                    command=TEXTS,
                    args=TEXTS,
                    env=many(NAMED),
                    mountPvcStorage={"type": "boolean"},
                ),
            )
        ),
    ),
)
DEVICE = closed("driver capabilities", driver=TEXT, count=WHOLE, capabilities=TEXTS)
COMPOSE_SCHEMA = closed(
    "services",
    services=closed(
        server=closed(
            build=closed(context=TEXT, dockerfile=TEXT),
            command=TEXTS,
            environment={"type": "object"},
            volumes=TEXTS,
            ports=TEXTS,
            shm_size=TEXT,
            healthcheck=closed(
                "test",
                test=TEXTS,
                interval=TEXT,
                timeout=TEXT,
                retries=WHOLE,
                start_period=TEXT,
            ),
            deploy=closed(resources=closed(reservations=closed(devices=many(DEVICE)))),
            restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
        )
    ),
    volumes={"type": "object"},
)


@pytest.mark.parametrize("manifest", KUBERNETES, ids=lambda m: m["kind"])
def test_a_manifest_has_the_fields_of_its_kind(manifest: dict[str, Any]) -> None:
    versions = {"Deployment": "apps/v1", "Service": "v1", "PersistentVolumeClaim": "v1"}
    assert manifest["apiVersion"] == versions[manifest["kind"]]
    spec = SCHEMAS[manifest["kind"]]
    whole = closed("metadata spec", apiVersion=TEXT, kind=TEXT, metadata=META, spec=spec)
    jsonschema.validate(manifest, whole)
    for wrong in ({"spek": {}}, {"metadata": {"name": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest | wrong, whole)


@pytest.mark.parametrize("manifest", KUBERNETES, ids=lambda m: m["kind"])
def test_kubernetes_own_schema_takes_a_manifest(manifest: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    assert kubernetes.validate(manifest, "1.34", strict=True) == "1.34"


def test_the_values_and_the_compose_file_have_fields_that_there_are() -> None:
    jsonschema.validate(VALUES, CHART)
    jsonschema.validate(COMPOSE, COMPOSE_SCHEMA)


def test_the_compose_files_own_schema_takes_it() -> None:
    found = find_spec("check_jsonschema")
    if found is None or not found.submodule_search_locations:
        pytest.skip("check-jsonschema is not installed")
    (folder,) = found.submodule_search_locations
    schema = Path(folder, "builtin_schemas", "vendor", "compose-spec.json").read_text()
    jsonschema.validate(COMPOSE, json.loads(schema))


def test_what_names_something_names_what_is_there() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in POD["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {CLAIM["metadata"]["name"]}
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    assert [port["targetPort"] for port in SERVICE["spec"]["ports"]] == list(ports)
    for probe in ("readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert f":{ports['http']}" in " ".join(SERVER["startupProbe"]["exec"]["command"])
    assert _after(SERVER["args"], "--port") == str(ports["http"])
    for container in (FIRST, SERVER):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
        for name in ("VLLM_VLORA_CACHE", "HF_HOME"):
            assert _environment(container)[name].startswith(mounts["cache"] + "/")
    assert {mount.partition(":")[0] for mount in COMPOSED["volumes"]} == {"cache", "./models"}
    assert (DEPLOY / COMPOSED["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSED["build"]["dockerfile"]).is_file()


def test_what_is_fetched_first_is_what_is_served() -> None:
    for served, fetched in (
        (_environment(SERVER), _environment(FIRST)),
        # The chart gives the server the volume as the Hub's cache.
        (_environment(MODEL) | {"HF_HOME": "/data"}, _environment(MODEL["initContainer"])),
    ):
        for cache in ("VLLM_VLORA_CACHE", "HF_HOME"):
            assert served[cache] == fetched[cache]
    kubernetes = _environment(SERVER)["VLLM_VLORA_CHECKPOINT"]
    assert FIRST["command"][-1] == "$(VLLM_VLORA_CHECKPOINT)"
    assert "$(VLLM_VLORA_CHECKPOINT)" in SERVER["args"]
    assert _environment(FIRST)["VLLM_VLORA_CHECKPOINT"] == kubernetes
    chart = _environment(MODEL)["VLLM_VLORA_CHECKPOINT"]
    assert MODEL["initContainer"]["args"] == [chart]
    for reference in (kubernetes, chart):
        where, digest = split_pin(reference)
        assert is_remote(where)
        assert digest is not None


def test_every_variable_is_one_that_something_reads() -> None:
    names = {*_environment(SERVER), *_environment(MODEL), *COMPOSED["environment"]}
    names |= _environment(MODEL["initContainer"]).keys()
    own = {name for name in names if name.startswith("VLLM_VLORA_")}
    assert own == {"VLLM_VLORA_CHECKPOINT", "VLLM_VLORA_CACHE"}
    sources = "".join(path.read_text() for path in (ROOT / "vllm_vlora").rglob("*.py"))
    read = set(re.findall(r'^[A-Z_]+ = "(VLLM_VLORA_\w+)"', sources, re.MULTILINE))
    assert own <= read
    hub = {"HF_HOME", "HF_TOKEN"}
    store = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert names - own == hub | store
    comments = (DEPLOY / "kubernetes.yaml").read_text()
    assert all(f"--from-literal={name}=" in comments for name in store)


def _vllm_lines() -> Iterator[list[str]]:
    yield SERVER["args"][SERVER["args"].index("$(VLLM_VLORA_CHECKPOINT)") + 1 :]
    yield COMPOSED["command"][COMPOSED["command"].index("${CHECKPOINT:?}") + 1 :]
    config = MODEL["vllmConfig"]
    # What the chart makes of its values.
    caching = "" if config.get("enablePrefixCaching") else "no-"
    yield [
        "--enable-lora", f"--{caching}enable-prefix-caching", "--max_loras", str(config["maxLoras"]),
        *config["extraArgs"],
    ]  # fmt: skip


def test_every_option_of_vllm_is_one_that_it_has() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for line in _vllm_lines():
        parsed = parser.parse_args(line)
        assert "--port" not in line or parsed.port == 8000
        assert "--max_loras" not in line or (parsed.enable_lora and parsed.max_lora_rank == 16)
        # Nobody turns off what vLLM has on: None stands for its own choice.
        assert parsed.enable_prefix_caching in (None, True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such-option", "1"])


def _our_lines() -> Iterator[list[str]]:
    for container in (FIRST, SERVER, MODEL["initContainer"]):
        yield [*container["command"], *container.get("args", [])]
    yield SERVER["startupProbe"]["exec"]["command"]
    yield COMPOSED["healthcheck"]["test"][1:]
    # The image's entry point stands before it.
    assert 'ENTRYPOINT ["vllm-vlora"]' in (DEPLOY / "Dockerfile").read_text()
    yield ["vllm-vlora", *COMPOSED["command"]]


def test_ray_serves_own_schemas_take_the_config() -> None:
    pytest.importorskip("grpc_reflection", reason="Ray Serve is not whole here")
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "examples/ray_serve/llm.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "ray.serve.llm:build_openai_app"
    pytest.importorskip("pyarrow", reason="Ray Serve LLM is not whole here")
    pytest.importorskip("vllm")
    from ray.serve.llm import LLMServingArgs
    from vllm.engine.arg_utils import AsyncEngineArgs

    (model,) = LLMServingArgs.model_validate(application.args).llm_configs
    assert set(model.engine_kwargs) <= {field.name for field in fields(AsyncEngineArgs)}
    assert model.lora_config is None


def test_every_command_of_ours_is_one_that_takes_its_options() -> None:
    group: Any = typer.main.get_command(app)
    for program, name, *words in _our_lines():
        assert program == "vllm-vlora"
        command = group.commands[name]
        # Names and values as the command reads them; an option that it has not is an error.
        context = command.make_context(name, list(words), resilient_parsing=False)
        known = {option for parameter in command.params for option in parameter.opts}
        assert name == "serve" or {w for w in words if w.startswith("--")} <= known
        assert context.params.get("checkpoint") or name == "ready"


def test_the_image_is_of_a_version_that_the_plugin_supports() -> None:
    from vllm_vlora.plugin import SUPPORTED_VLLM

    found = re.search(
        r"^FROM vllm/vllm-openai:v(\d+)\.(\d+)", (DEPLOY / "Dockerfile").read_text(), re.M
    )
    assert found
    first, end = SUPPORTED_VLLM
    assert first <= (int(found[1]), int(found[2])) < end


def _environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def _after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]
