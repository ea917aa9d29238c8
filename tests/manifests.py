"""What is wrong with a file of Kubernetes documents or of Compose, held against schemas; nothing if all is right."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from crd_schemas import COMPOSE, CUSTOM, Schema

KUBERNETES_VERSIONS = ("1.30", "1.37")
"""The oldest and the newest whose schemas native kinds and pods are held against."""

Document = dict[str, Any]


def load(text: str) -> list[Document]:
    """The documents of a file. YAMLError where it is no YAML, or a key stands twice, of which the last would count."""
    for node in yaml.compose_all(text, yaml.SafeLoader):
        if twice := list(_twice(node)):
            raise yaml.YAMLError(f"twice in one mapping: {', '.join(twice)}")
    return list(yaml.safe_load_all(text))


def _twice(node: Any) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        yield from sorted({name for name in names if names.count(name) > 1})
        for _, value in node.value:
            yield from _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value)


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Where, and the template of a pod, of all in a document."""

    def below(where: str, value: Any) -> Iterator[tuple[str, Document]]:
        if isinstance(value, dict):
            for name, each in value.items():
                if name in ("template", "submitterPodTemplate") and isinstance(each, dict):
                    yield f"{where}.{name}", each
                yield from below(f"{where}.{name}", each)
        elif isinstance(value, list):
            for number, each in enumerate(value):
                yield from below(f"{where}[{number}]", each)

    yield from below(str(document.get("kind")), document)


def problems_of_manifest(text: str) -> Iterator[str]:
    """Of a file of Kubernetes documents: schemas, and what every pod must have."""
    try:
        documents = load(text)
    except yaml.YAMLError as error:
        yield f"no YAML: {error}"
        return
    for document in documents:
        problem = None
        for problem in _problems_of_document(document):
            yield f"{document.get('kind')}: {problem}"
        if problem is None:
            for where, template in pods(document):
                yield from (f"{where}: {problem}" for problem in _problems_of_pod(template["spec"]))


def problems_of_rules_as_a_resource(text: str) -> list[str]:
    """Of a file of alert rules, were its content the spec of a PrometheusRule."""
    try:
        (spec,) = load(text)
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "x"}, "spec": spec}
    return list(_against(CUSTOM["PrometheusRule"], rule))


def problems_of_compose_schema(compose: Document) -> list[str]:
    """Of a Compose file."""
    return list(_against(COMPOSE, compose))


def _problems_of_document(document: Document) -> Iterator[str]:
    kind = str(document.get("kind"))
    if kind not in CUSTOM:
        yield from _against_kubernetes(document)
        return
    yield from _against(CUSTOM[kind], document)
    for where, template in pods(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        yield from (f"{where}: {problem}" for problem in _against_kubernetes(pod))
    for options in _values(document, "autoscalerOptions"):
        # What these have in common with a container is one: the operator adds it to the head.
        fields = ("image", "imagePullPolicy", "securityContext", "resources", "env", "envFrom", "volumeMounts")
        container = {"name": "autoscaler", **{name: options[name] for name in fields if name in options}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
        yield from (f"autoscalerOptions: {problem}" for problem in _against_kubernetes(pod))


def _values(value: Any, name: str) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == name:
                yield each
            yield from _values(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _values(each, name)


def _against(schema: Schema, value: Any) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        yield f"{error.json_path}: {error.message[:200]}"


def _against_kubernetes(document: Document) -> Iterator[str]:
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {error.json_path}: {error.message[:200]}"
        except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
            yield f"Kubernetes {version}: no such kind: {document.get('apiVersion')} {document.get('kind')}: {error!r}"


def _problems_of_pod(pod: Document) -> Iterator[str]:
    """Is it root, does it write to its root, can it become more than it is."""
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield "may be root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    volumes = {each["name"] for each in pod.get("volumes", [])}
    for container in pod["containers"]:
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        if container.get("securityContext") != wanted:
            yield f"{container.get('name')}: expected the security context {wanted}"
        resources = container.get("resources", {})
        if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
            yield f"{container.get('name')}: has no limit of memory or asks for no processor"
        mounted = {each.get("name") for each in container.get("volumeMounts", [])}
        if mounted != volumes:
            yield f"{container.get('name')}: mounts {sorted(map(str, mounted))} of {sorted(volumes)}"
