#!/usr/bin/env bash
# Tests the whole platform on this machine's Docker: creates a kind cluster, installs Kubeflow Pipelines, KServe and the
# chart with values-cpu.yaml, asks the endpoint the golden questions and runs one tiny round. `make e2e-kind` takes
# about an hour the first time.
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
  kubectl -n kubeflow get workflows -o yaml > "$LOGS/workflows.yaml"
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
    --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY "clincot-cpu:$VERSION" "$@"
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
  kubectl -n kubeflow wait --for=condition=Available --timeout=1200s deployment --all
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

# Images of noise with a bright square, drawn by the tests' own code in the cpu image. They give every stage something
# to do, but the judges' scores hardly differ, so pair.min_gap is small below.
draw='from pathlib import Path
from tests.support.tiny import write_set
write_set(Path("/work/data"), studies=16, seed=1)
write_set(Path("/work/benchmark"), studies=8, seed=2)'

store() { # install the chart with its store, and upload a data set ($DATA) and a benchmark ($BENCHMARK)
  say "the chart"
  helm install "$RELEASE" charts/clincot --namespace "$NAMESPACE" --create-namespace --values "$VALUES" --timeout 20m \
    --set server.first.enabled=false
  kubectl -n "$NAMESPACE" rollout status "statefulset/$RELEASE-seaweedfs" --timeout=300s
  say "a data set and a benchmark"
  install -d -m 0777 "$LOGS/work"
  docker run --rm --volume "$LOGS/work:/work" --volume "$PWD/tests:/checkout/tests:ro" --env PYTHONPATH=/checkout \
    --entrypoint python "clincot-cpu:$VERSION" -c "$draw"
  AWS_ACCESS_KEY_ID=$(secret AWS_ACCESS_KEY_ID)
  AWS_SECRET_ACCESS_KEY=$(secret AWS_SECRET_ACCESS_KEY)
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
  forward "$NAMESPACE" "$RELEASE-seaweedfs" 8333 8333
  DATA=$(clincot pipeline put /work/data s3://clincot/e2e)
  BENCHMARK=$(clincot pipeline put /work/benchmark s3://clincot/e2e)
}

endpoint() { # serve the first model, and ask it the benchmark's golden questions
  say "rollout of the first model"
  helm upgrade "$RELEASE" charts/clincot --namespace "$NAMESPACE" --values "$VALUES" --timeout 20m \
    --set "pipeline.data=$DATA" --set "pipeline.benchmark=$BENCHMARK"
  job_done "$RELEASE-rollout-2" 1800
  helm test "$RELEASE" --namespace "$NAMESPACE" --logs --timeout 15m
}

round() {
  say "a round"
  local file
  for file in params cluster service; do
    kubectl -n "$NAMESPACE" get configmap "$RELEASE" -o "jsonpath={.data.$file\.yaml}" > "$LOGS/work/$file.yaml"
  done
  forward kubeflow ml-pipeline 8888 8888
  clincot pipeline submit --endpoint http://127.0.0.1:8888 --params /work/params.yaml --cluster /work/cluster.yaml \
    --service /work/service.yaml --data "$DATA" --benchmark "$BENCHMARK" --run-name e2e --wait 3600 \
    --set prepare.rounds=1 --set pair.min_gap=0.001 --set pair.length_auc_tolerance=0.5
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
endpoint
round
say "all checks passed"
