"""What kinds that are no part of Kubernetes take, as JSON schemas; and what Compose takes.

Written down by hand from the published definitions, to the depth and width that the manifests of infra/ need: KubeRay
1.7 (ray.io_rayjobs.yaml, ray.io_raycronjobs.yaml; `timeZone` came with it, the kind itself with 1.6) and the operator's
PodMonitor and PrometheusRule. A field that is not listed is refused, because an API server drops a field that it does
not know. Pods within are left open here: Kubernetes' own schema is for them.
"""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_SWITCH: Schema = {"type": "boolean"}
_WHOLE: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_POSITIVE: Schema = {"type": "integer", "minimum": 1}
_OPEN: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_TEXT_BY_NAME: Schema = {"type": "object", "additionalProperties": _TEXT}
_PERIOD: Schema = {
    "type": "string",
    "pattern": r"^(0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
    "minLength": 1,
}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def _object(required: str = "", **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def _kind(api_version: str, kind: str, spec: Schema) -> Schema:
    metadata = _object(name=_TEXT, generateName=_TEXT, namespace=_TEXT, labels=_TEXT_BY_NAME, annotations=_TEXT_BY_NAME)
    metadata["anyOf"] = [{"required": ["name"]}, {"required": ["generateName"]}]
    head = {"apiVersion": {"const": api_version}, "kind": {"const": kind}}
    return _object("apiVersion kind metadata spec", **head, metadata=metadata, spec=spec)


# --- KubeRay ------------------------------------------------------------------------------------------------------

_TEMPLATE = _object(
    "spec",
    metadata=_object(name=_TEXT, namespace=_TEXT, labels=_TEXT_BY_NAME, annotations=_TEXT_BY_NAME, finalizers=_TEXTS),
    spec={"type": "object", "required": ["containers"]},
)
_GROUP: dict[str, Schema] = {
    "template": _TEMPLATE,
    "rayStartParams": _TEXT_BY_NAME,  # numbers, too, are texts here
    "resources": _TEXT_BY_NAME,
    "labels": _TEXT_BY_NAME,
}
_CLUSTER = _object(
    "headGroupSpec",
    rayVersion=_TEXT,
    authOptions=_object(mode=_one_of("disabled", "token"), secretName=_TEXT, enableK8sTokenAuth=_SWITCH),
    enableInTreeAutoscaling=_SWITCH,
    autoscalerOptions=_object(
        idleTimeoutSeconds=_WHOLE,
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        version=_one_of("v1", "v2"),
        image=_TEXT,
        imagePullPolicy=_TEXT,
        # As of a container, whose schema is Kubernetes' own.
        securityContext=_OPEN,
        resources=_OPEN,
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
    ),
    headGroupSpec=_object("template", **_GROUP, serviceType=_TEXT, headService=_OPEN, enableIngress=_SWITCH),
    workerGroupSpecs=_list(
        _object(
            "groupName minReplicas maxReplicas template",
            **_GROUP,
            groupName=_TEXT,
            replicas=_WHOLE,
            minReplicas=_WHOLE,
            maxReplicas=_WHOLE,
            numOfHosts=_WHOLE,
            idleTimeoutSeconds=_WHOLE,
            suspend=_SWITCH,
        )
    ),
    headServiceAnnotations=_TEXT_BY_NAME,
    suspend=_SWITCH,
)
_POLICY = _object("policy", policy=_one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"))
_JOB = _object(
    entrypoint=_TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=_TEXT,
    runtimeEnvYAML=_TEXT,
    jobId=_TEXT,
    metadata=_TEXT_BY_NAME,
    # The operator knows no others, although the published definition takes any text.
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=_object(backoffLimit=_WHOLE),
    submitterPodTemplate=_TEMPLATE,
    backoffLimit=_COUNT,
    activeDeadlineSeconds=_WHOLE,
    shutdownAfterJobFinishes=_SWITCH,
    ttlSecondsAfterFinished=_COUNT,
    deletionStrategy=_object(onSuccess=_POLICY, onFailure=_POLICY),
    clusterSelector=_TEXT_BY_NAME,
    rayClusterSpec=_CLUSTER,
    suspend=_SWITCH,
)
_CRON_JOB = _object(
    "schedule jobTemplate",
    schedule=_TEXT,
    timeZone={"type": "string", "minLength": 1},
    suspend=_SWITCH,
    jobTemplate=_JOB,
)

# --- Prometheus' operator -----------------------------------------------------------------------------------------

_LABEL: Schema = {"type": "string", "pattern": r"^[a-zA-Z_][a-zA-Z0-9_]*$"}
_RELABELINGS = _list(
    _object(
        sourceLabels=_list(_LABEL),
        separator=_TEXT,
        targetLabel=_TEXT,
        regex=_TEXT,
        modulus=_COUNT,
        replacement=_TEXT,
        action=_one_of(
            "replace",
            "keep",
            "drop",
            "hashmod",
            "labelmap",
            "labeldrop",
            "labelkeep",
            "lowercase",
            "uppercase",
            "keepequal",
            "dropequal",
        ),
    )
)
_POD_MONITOR = _object(
    "selector podMetricsEndpoints",
    selector=_object(matchLabels=_TEXT_BY_NAME),
    namespaceSelector=_object(any=_SWITCH, matchNames=_TEXTS),
    jobLabel=_TEXT,
    podTargetLabels=_TEXTS,
    podMetricsEndpoints=_list(
        _object(
            port=_TEXT,
            path=_TEXT,
            scheme=_one_of("http", "https"),
            params=_OPEN,
            interval=_PERIOD,
            scrapeTimeout=_PERIOD,
            honorLabels=_SWITCH,
            honorTimestamps=_SWITCH,
            filterRunning=_SWITCH,
            relabelings=_RELABELINGS,
            metricRelabelings=_RELABELINGS,
        )
    ),
    sampleLimit=_COUNT,
    targetLimit=_COUNT,
)
_RULE = _object(
    "expr",
    alert=_TEXT,
    record=_TEXT,
    expr=_TEXT,
    labels=_TEXT_BY_NAME,
    annotations=_TEXT_BY_NAME,
    keep_firing_for=_PERIOD,
    **{"for": _PERIOD},
)
_RULES = _object(groups=_list(_object("name rules", name=_TEXT, interval=_PERIOD, limit=_COUNT, rules=_list(_RULE))))

# --- one machine --------------------------------------------------------------------------------------------------

_SETTINGS: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}}
_NAMES: Schema = {"type": "array", "items": _TEXT, "uniqueItems": True}
_DEPENDENCY = _object(
    "condition", condition=_one_of("service_started", "service_healthy", "service_completed_successfully")
)
_SERVICE = _object(
    "image",
    image=_TEXT,
    build=_object("context", context=_TEXT, dockerfile=_TEXT, args=_SETTINGS, target=_TEXT),
    command={"type": ["string", "array"]},
    environment=_SETTINGS,
    ports=_NAMES,
    volumes=_NAMES,
    depends_on={"oneOf": [_NAMES, {"type": "object", "additionalProperties": _DEPENDENCY}]},
    profiles=_NAMES,
    restart={"type": "string", "pattern": r"^(no|always|unless-stopped|on-failure(:\d+)?)$"},
    read_only=_SWITCH,
    tmpfs=_NAMES,
    shm_size={"type": ["string", "integer"]},
    cap_drop=_NAMES,
    security_opt=_NAMES,
    user=_TEXT,
)

COMPOSE: Schema = {
    **_object(
        "services",
        name=_TEXT,
        services={"type": "object", "additionalProperties": _SERVICE},
        volumes={"type": "object", "additionalProperties": _object(driver=_TEXT, driver_opts=_SETTINGS)},
    ),
    "patternProperties": {"^x-": {}},
}
"""Of the Compose specification, the fields that infra/compose.yaml has or is likely to get."""

CUSTOM: dict[str, Schema] = {
    "RayJob": _kind("ray.io/v1", "RayJob", _JOB),
    "RayCronJob": _kind("ray.io/v1", "RayCronJob", _CRON_JOB),
    "PodMonitor": _kind("monitoring.coreos.com/v1", "PodMonitor", _POD_MONITOR),
    "PrometheusRule": _kind("monitoring.coreos.com/v1", "PrometheusRule", _RULES),
}
"""Kind -> what a document of it takes."""
