{{/* Names, labels, settings files, and the parts that all pods share. */}}

{{/* A name of at most `length` characters; a longer one ends in a digest, so that two of them never become one.
{name, length} */}}
{{- define "clincot.shorten" -}}
{{- if gt (len .name) (int .length) -}}
{{- printf "%s-%s" (trunc (int (sub .length 7)) .name | trimSuffix "-") (sha256sum .name | trunc 6) -}}
{{- else -}}
{{- .name -}}
{{- end -}}
{{- end }}

{{- define "clincot.fullname" -}}
{{- $name := printf "%s-%s" .Release.Name .Chart.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- end -}}
{{- include "clincot.shorten" (dict "name" $name "length" 40) -}}
{{- end }}

{{/* Name of pipeline and experiment without a suffix. It is unique among the releases that share a Kubeflow Pipelines. */}}
{{- define "clincot.scope" -}}
{{- $name := uniq (list .Release.Namespace .Release.Name .Values.line) | join "-" -}}
{{- include "clincot.shorten" (dict "name" $name "length" 50) -}}
{{- end }}

{{- define "clincot.pipelineName" -}}
{{- default (printf "%s-round" (include "clincot.scope" .)) .Values.pipeline.name -}}
{{- end }}

{{/* Whether hooks keep or remove the recurring run; not empty if they do. They also do if the pipeline is switched off,
as long as Kubeflow Pipelines is there. */}}
{{- define "clincot.reconcilesRuns" -}}
{{- if or .Values.pipeline.enabled (.Capabilities.APIVersions.Has "argoproj.io/v1alpha1/Workflow") -}}
true
{{- end -}}
{{- end }}

{{- define "clincot.experiment" -}}
{{- default (include "clincot.scope" .) .Values.pipeline.experiment -}}
{{- end }}

{{/* Name of the policy's InferenceService. It is unique among the releases of a namespace. */}}
{{- define "clincot.serverName" -}}
{{- $name := uniq (list .Release.Name .Values.line) | join "-" -}}
{{- default (include "clincot.shorten" (dict "name" $name "length" 38)) .Values.server.name -}}
{{- end }}

{{- define "clincot.selector" -}}
app.kubernetes.io/name: clincot
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "clincot.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: clincot
{{ include "clincot.selector" . }}
{{- end }}

{{/* The namespaces that need secrets and settings: the release's, and the run pods' if it is a different one. JSON. */}}
{{- define "clincot.namespaces" -}}
{{- list .Release.Namespace .Values.kfp.runNamespace | uniq | toJson -}}
{{- end }}

{{/* registry/repository:tag or @digest; global.imageRegistry replaces the image's own registry. {root, image} */}}
{{- define "clincot.image" -}}
{{- $repository := .image.repository -}}
{{- if .root.Values.global.imageRegistry -}}
{{- $first := first (splitList "/" $repository) -}}
{{- if and (contains "/" $repository) (or (contains "." $first) (contains ":" $first)) -}}
{{- $repository = trimPrefix (printf "%s/" $first) $repository -}}
{{- end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .root.Values.global.imageRegistry) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end }}

{{- define "clincot.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "clincot.storeUrl" -}}
{{- printf "s3://%s/%s" .Values.store.bucket .Values.store.prefix -}}
{{- end }}

{{/* {key of the store's Secret: environment variable}; empty with a workload identity, which needs no keys. JSON. */}}
{{- define "clincot.storeKeys" -}}
{{- with .Values.store -}}
{{- if .workloadIdentity -}}
{}
{{- else if .existingSecret -}}
{{- toJson (dict .secretKeys.accessKey "AWS_ACCESS_KEY_ID" .secretKeys.secretKey "AWS_SECRET_ACCESS_KEY") -}}
{{- else -}}
{{- toJson (dict "AWS_ACCESS_KEY_ID" "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_SECRET_ACCESS_KEY") -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "clincot.storeSecret" -}}
{{- default (printf "%s-store" (include "clincot.fullname" .)) .Values.store.existingSecret -}}
{{- end }}

{{- define "clincot.storeEndpoint" -}}
{{- if .Values.store.endpoint -}}
{{- .Values.store.endpoint -}}
{{- else if .Values.seaweedfs.enabled -}}
{{- printf "http://%s-seaweedfs.%s.svc.%s:8333" (include "clincot.fullname" .) .Release.Namespace .Values.clusterDomain -}}
{{- else -}}
{{- printf "https://s3.%s.amazonaws.com" .Values.store.region -}}
{{- end -}}
{{- end }}

{{- define "clincot.gitSecret" -}}
{{- if .Values.git.existingSecret -}}
{{- .Values.git.existingSecret -}}
{{- else if .Values.git.password -}}
{{- printf "%s-git" (include "clincot.fullname" .) -}}
{{- end -}}
{{- end }}

{{- define "clincot.kfpEndpoint" -}}
{{- default (printf "http://ml-pipeline.%s.svc.%s:8888" .Values.kfp.namespace .Values.clusterDomain) .Values.kfp.endpoint -}}
{{- end }}

{{/* Name of a service account: the one that is set, or the chart's own. {root, which} */}}
{{- define "clincot.account" -}}
{{- default (printf "%s-%s" (include "clincot.fullname" .root) .which) (get .root.Values.serviceAccounts.names .which) -}}
{{- end }}

{{/* The service accounts of this release's pods and runs, with their namespaces. JSON. */}}
{{- define "clincot.accounts" -}}
{{- $namespaces := dict "runner" .Values.kfp.runNamespace "deployer" .Release.Namespace "server" .Release.Namespace -}}
{{- if include "clincot.reconcilesRuns" . -}}{{- $namespaces = set $namespaces "scheduler" .Release.Namespace -}}{{- end -}}
{{- if or .Values.seaweedfs.enabled .Values.monitoring.serviceMonitor .Values.monitoring.rules.enabled -}}
{{- $namespaces = set $namespaces "store" .Release.Namespace -}}
{{- end -}}
{{- if .Values.seaweedfs.enabled -}}{{- $namespaces = set $namespaces "bucket" .Release.Namespace -}}{{- end -}}
{{- if .Values.pipeline.trainJobs -}}{{- $namespaces = set $namespaces "trainer" .Values.kfp.runNamespace -}}{{- end -}}
{{- toJson $namespaces -}}
{{- end }}

{{- define "clincot.cacheClaim" -}}
{{- if .Values.pipeline.cache.existingClaim -}}
{{- .Values.pipeline.cache.existingClaim -}}
{{- else if .Values.pipeline.cache.create -}}
{{- printf "%s-cache" (include "clincot.fullname" .) -}}
{{- end -}}
{{- end }}

{{/* "https://host:9000" -> "host:9000" */}}
{{- define "clincot.hostOf" -}}
{{- trimSuffix "/" (last (splitList "://" .)) -}}
{{- end }}

{{/* The port of a URL: its own, or that of its scheme; 22 for git over SSH. */}}
{{- define "clincot.portOf" -}}
{{- $own := regexFind ":[0-9]+$" (urlParse .).host -}}
{{- if $own -}}
{{- trimPrefix ":" $own -}}
{{- else if hasPrefix "http:" . -}}
80
{{- else if hasPrefix "https:" . -}}
443
{{- else -}}
22
{{- end -}}
{{- end }}

{{- define "clincot.noProxy" -}}
{{- compact (list .Values.proxy.noProxy "localhost" "127.0.0.1" "::1" ".svc" (printf ".svc.%s" .Values.clusterDomain) (printf ".%s" .Release.Namespace) (printf ".%s" .Values.kfp.runNamespace) (printf ".%s" .Values.kfp.namespace) "$(KUBERNETES_SERVICE_HOST)") | uniq | join "," -}}
{{- end }}

{{/* Of every pod; "clincot.shapedSpec" adds the user and the group. */}}
{{- define "clincot.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "clincot.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Environment of the chart's own pods: store, proxies and CAs. It refers to Secrets and contains no secret value. */}}
{{- define "clincot.env" -}}
- {name: HOME, value: /tmp}
- {name: AWS_ENDPOINT_URL_S3, value: {{ include "clincot.storeEndpoint" . | quote }}}
- {name: AWS_REGION, value: {{ .Values.store.region | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.store.region | quote }}}
{{- range $key, $name := include "clincot.storeKeys" . | fromJson }}
- name: {{ $name }}
  valueFrom: {secretKeyRef: {name: {{ include "clincot.storeSecret" $ }}, key: {{ $key | quote }}}}
{{- end }}
{{- include "clincot.surroundings" . }}
{{- end }}

{{- define "clincot.surroundings" -}}
{{- if .Values.customCA.configMap }}
{{- range $name := list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" "GIT_SSL_CAINFO" }}
- {name: {{ $name }}, value: /etc/clincot/ca/cabundle.crt}
{{- end }}
{{- end }}
{{- if .Values.proxy.http }}
- {name: HTTP_PROXY, value: {{ .Values.proxy.http | quote }}}
{{- end }}
{{- if .Values.proxy.https }}
- {name: HTTPS_PROXY, value: {{ .Values.proxy.https | quote }}}
{{- end }}
{{- if or .Values.proxy.http .Values.proxy.https }}
- {name: NO_PROXY, value: {{ include "clincot.noProxy" . | quote }}}
{{- end }}
- {name: CLINCOT_WAIT_S, value: {{ int .Values.pipeline.waitSeconds | quote }}}
{{- end }}

{{/* Account and security context of the chart's own pods. {root, account, token} */}}
{{- define "clincot.pod" -}}
serviceAccountName: {{ include "clincot.account" (dict "root" .root "which" .account) }}
automountServiceAccountToken: {{ .token }}
securityContext:
  {{- include "clincot.podSecurity" .root | nindent 2 }}
{{- end }}

{{/* Labels of the chart's own pods. {root, component}
Istio: without a sidecar, a pod of a Job ends, and servers are reached by run pods, which have none either. */}}
{{- define "clincot.podLabels" -}}
{{ include "clincot.labels" .root }}
app.kubernetes.io/component: {{ .component }}
sidecar.istio.io/inject: "false"
{{- end }}

{{/* Settings of one of the chart's own pods: podDefaults, and the workload's own. {root, own}. JSON. */}}
{{- define "clincot.ownPod" -}}
{{- include "clincot.podSettings" (dict "below" .root.Values.podDefaults "own" .own) -}}
{{- end }}

{{- define "clincot.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: settings, mountPath: /etc/clincot/settings, readOnly: true}
{{- if .Values.customCA.configMap }}
- {name: ca, mountPath: /etc/clincot/ca, readOnly: true}
{{- end }}
{{- end }}

{{/* Volumes of the chart's own pods. {root, tmp: size of /tmp} */}}
{{- define "clincot.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ default "4Gi" .tmp }}}
- name: settings
  configMap: {name: {{ include "clincot.fullname" .root }}}
{{- with .root.Values.customCA.configMap }}
- name: ca
  configMap: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* KServe's storage initialiser reads the store's address from these annotations of the server account's Secret. */}}
{{- define "clincot.storeAnnotations" -}}
{{- $endpoint := include "clincot.storeEndpoint" . -}}
serving.kserve.io/s3-endpoint: {{ include "clincot.hostOf" $endpoint | quote }}
serving.kserve.io/s3-usehttps: {{ ternary "1" "0" (hasPrefix "https://" $endpoint) | quote }}
serving.kserve.io/s3-region: {{ .Values.store.region | quote }}
serving.kserve.io/s3-verifyssl: "1"
{{- if .Values.customCA.configMap }}
serving.kserve.io/s3-cabundle-configmap: {{ .Values.customCA.configMap | quote }}
serving.kserve.io/s3-cabundle: /etc/ssl/custom-certs/cabundle.crt
{{- end }}
{{- end }}

{{/* The ClusterStorageContainer that the chart creates; its name is unique in the cluster. */}}
{{- define "clincot.ownStorageContainer" -}}
{{- include "clincot.shorten" (dict "name" (printf "%s-%s" (include "clincot.fullname" .) .Release.Namespace) "length" 63) -}}
{{- end }}

{{/* The ClusterStorageContainer of server and judges; empty if KServe chooses one. */}}
{{- define "clincot.storageContainer" -}}
{{- if .Values.server.storageContainer -}}
{{- .Values.server.storageContainer -}}
{{- else if .Values.server.storageInitializer.create -}}
{{- include "clincot.ownStorageContainer" . -}}
{{- end -}}
{{- end }}

{{/* Name of a judge's InferenceService. KServe appends -predictor, and the label of a pod has at most 63 characters. */}}
{{- define "clincot.judgeName" -}}
{{- $name := printf "%s-judge-%s" (include "clincot.fullname" .root) .judge.name -}}
{{- include "clincot.shorten" (dict "name" $name "length" 53) -}}
{{- end }}

{{/* judge.judges of params.yaml: the address of each judge. JSON. */}}
{{- define "clincot.judgeSpecs" -}}
{{- $specs := list -}}
{{- range $judge := .Values.judges -}}
{{- $spec := dict "name" $judge.name "weight" (default 1.0 $judge.weight | float64) -}}
{{- if $judge.modelUri -}}
{{- $service := include "clincot.judgeName" (dict "root" $ "judge" $judge) -}}
{{- $spec = merge $spec (dict "url" (printf "http://%s-predictor.%s.svc.%s/v1" $service $.Release.Namespace $.Values.clusterDomain) "model" $service) -}}
{{- else if $judge.url -}}
{{- $spec = merge $spec (dict "url" $judge.url "model" (default "" $judge.model)) -}}
{{- if $judge.apiKeySecret -}}
{{- $spec = set $spec "api_key_env" (include "clincot.judgeKeyEnv" $judge) -}}
{{- end -}}
{{- else -}}
{{- $spec = set $spec "path" $judge.path -}}
{{- end -}}
{{- $specs = append $specs $spec -}}
{{- end -}}
{{- toJson $specs -}}
{{- end }}

{{- define "clincot.judgeKeyEnv" -}}
{{- printf "JUDGE_KEY_%s" (.name | upper | replace "-" "_") -}}
{{- end }}

{{/* Override the values `below` with the values `above`, as clincot.config.load_params does. Maps are merged; everything
else, and `grounders`, is replaced. mergeOverwrite cannot be used, because it skips false, 0 and "". {below, above}.
JSON. */}}
{{- define "clincot.overlay" -}}
{{- $out := deepCopy .below -}}
{{- range $key, $value := .above -}}
{{- $old := get $out $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $old) (ne $key "grounders") -}}
{{- $value = include "clincot.overlay" (dict "below" $old "above" $value) | fromJson -}}
{{- end -}}
{{- $out = set $out $key $value -}}
{{- end -}}
{{- toJson $out -}}
{{- end }}

{{/* The values of pipeline.recipe, from the chart's copy of recipes/. Empty without a recipe ("clincot.problems" refuses
an unknown one). JSON. */}}
{{- define "clincot.recipe" -}}
{{- $recipe := dict -}}
{{- with .Values.pipeline.recipe -}}
{{- with $.Files.Get (printf "recipes/%s.yaml" .) -}}
{{- $recipe = set (fromYaml .) "recipe" (dict "name" $.Values.pipeline.recipe) -}}
{{- end -}}
{{- end -}}
{{- toJson $recipe -}}
{{- end }}

{{/* params.yaml: the recipe, overridden by what follows from other values, overridden by pipeline.params. YAML. */}}
{{- define "clincot.params" -}}
{{- $derived := dict "publish" (dict "store" (include "clincot.storeUrl" .) "name" .Values.line) -}}
{{- if .Values.git.url -}}
{{- $derived = set $derived "version" (dict "repository" .Values.git.url "branch" .Values.git.branch) -}}
{{- end -}}
{{- if .Values.server.first.checkpoint -}}
{{- $derived = set $derived "preflight" (dict "base" .Values.server.first.checkpoint) -}}
{{- end -}}
{{- $params := include "clincot.recipe" . | fromJson -}}
{{- range $values := list $derived .Values.pipeline.params -}}
{{- $params = include "clincot.overlay" (dict "below" $params "above" $values) | fromJson -}}
{{- end -}}
{{- if .Values.judges -}}
{{- $judges := include "clincot.judgeSpecs" . | fromJsonArray -}}
{{- $params = set $params "judge" (set (default dict $params.judge) "judges" $judges) -}}
{{- end -}}
{{- toYaml $params -}}
{{- end }}

{{/* service.yaml, which src/clincot/deployment/service_settings.py reads. YAML. */}}
{{- define "clincot.service" -}}
{{- with .Values.server -}}
name: {{ include "clincot.serverName" $ }}
namespace: {{ $.Release.Namespace }}
instance: {{ $.Release.Name | quote }}
release: {name: {{ $.Release.Name | quote }}, config_map: {{ include "clincot.fullname" $ }}}
engine: {{ .engine }}
mode: {{ .mode }}
gateway_api: {{ .gatewayApi | quote }}
kserve_namespace: {{ .kserveNamespace }}
image: {{ include "clincot.image" (dict "root" $ "image" $.Values.image.serve) }}
runtime: {{ include "clincot.runtime" (dict "root" $ "engine" .engine) }}
service_account: {{ include "clincot.account" (dict "root" $ "which" "server") }}
{{- with (include "clincot.storageContainer" $) }}
storage_container: {{ . }}
{{- end }}
replicas: {{ int .replicas }}
resources:
  {{- if eq .engine "vllm" }}
  {{- include "clincot.withGpus" (dict "resources" .resources "type" $.Values.pipeline.gpu.type "gpus" .gpus) | nindent 2 }}
  {{- else }}
  {{- toYaml .resources | nindent 2 }}
  {{- end }}
transformer_resources:
  {{- toYaml .frontResources | nindent 2 }}
shm: {{ $.Values.servingRuntime.shm }}
startup_s: {{ int $.Values.servingRuntime.startupSeconds }}
drain_s: {{ int .drainSeconds }}
grace_s: {{ int .graceSeconds }}
{{- if .grpc }}
grpc: true
{{- end }}
pod: {{ include "clincot.serverPod" $ }}
{{- if eq .engine "vllm" }}
vllm_args: {{ include "clincot.vllmArguments" (dict "gpus" .gpus "args" .args) }}
{{- end }}
{{- with $.Values.customCA.configMap }}
ca_config_map: {{ . }}
{{- end }}
{{- if or $.Values.proxy.http $.Values.proxy.https }}
proxies:
  {{- with $.Values.proxy.http }}
  HTTP_PROXY: {{ . | quote }}
  {{- end }}
  {{- with $.Values.proxy.https }}
  HTTPS_PROXY: {{ . | quote }}
  {{- end }}
  NO_PROXY: {{ include "clincot.noProxy" $ | quote }}
{{- end }}
{{- with .apiKeysSecret }}
api_keys_secret: {{ . }}
{{- end }}
listen: {{ $.Values.listen | quote }}
service_url: "http://{service}.{namespace}.svc.{{ $.Values.clusterDomain }}"
{{- with .endpointUrl }}
endpoint_url: {{ . | quote }}
{{- end }}
{{- with .settings }}
serve:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "clincot.withGpus" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpus) 0 -}}
{{- $resources = set $resources "limits" (set (default dict $resources.limits) .type (int .gpus | toString)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "clincot.runtime" -}}
{{- if .root.Values.servingRuntime.create -}}
{{- printf "%s-%s" (include "clincot.fullname" .root) (ternary "vllm" "serve" (eq .engine "vllm")) -}}
{{- else -}}
{{- .root.Values.servingRuntime.name -}}
{{- end -}}
{{- end }}

{{- define "clincot.probe" -}}
httpGet: {path: {{ .path }}, port: 8080}
periodSeconds: 10
timeoutSeconds: 5
failureThreshold: {{ .failures }}
{{- end }}

{{/* Tolerations with the keys of cluster.yaml: `seconds` instead of `tolerationSeconds`. JSON. */}}
{{- define "clincot.clusterTolerations" -}}
{{- $out := list -}}
{{- range . -}}
{{- $toleration := omit . "tolerationSeconds" -}}
{{- if hasKey . "tolerationSeconds" }}{{- $toleration = set $toleration "seconds" .tolerationSeconds -}}{{- end -}}
{{- $out = append $out $toleration -}}
{{- end -}}
{{- toJson $out -}}
{{- end }}

{{/* launch.yaml, which src/clincot/training/launch_settings.py reads. Each node of a TrainJob gets the resources that the
task `train` would get without one. YAML. */}}
{{- define "clincot.launch" -}}
{{- $launch := deepCopy .Values.pipeline.launch -}}
{{- if .Values.pipeline.trainJobs -}}
{{- $gpu := .Values.pipeline.gpu -}}
{{- $node := default dict (get .Values.pipeline.stages "train") -}}
{{- $count := int (ternary (get $node "count") $gpu.count (hasKey $node "count")) -}}
{{- $requests := default $gpu.resources.requests $node.requests -}}
{{- $limits := deepCopy (default $gpu.resources.limits $node.limits) -}}
{{- if gt $count 0 -}}
{{- $limits = set $limits (default $gpu.type $node.accelerator) (toString $count) -}}
{{- end -}}
{{- $tolerations := list -}}
{{- range (default $gpu.tolerations $node.tolerations) -}}
{{- $toleration := omit . "seconds" -}}
{{- if hasKey . "seconds" }}{{- $toleration = set $toleration "tolerationSeconds" .seconds -}}{{- end -}}
{{- $tolerations = append $tolerations $toleration -}}
{{- end -}}
{{- $image := include "clincot.image" (dict "root" . "image" (ternary .Values.image.cuda .Values.image.cpu (gt $count 0))) -}}
{{- $job := dict "image" $image "claim" (include "clincot.cacheClaim" .) "mount" "/cache" "namespace" .Values.kfp.runNamespace -}}
{{- $job = set $job "processes_per_node" (max 1 $count) -}}
{{- $job = set $job "resources" (dict "requests" $requests "limits" $limits) -}}
{{- $job = set $job "node_selector" (default $gpu.nodeSelector $node.node_selector) -}}
{{- $job = set $job "tolerations" $tolerations -}}
{{- $job = set $job "image_pull_secrets" .Values.global.imagePullSecrets -}}
{{- $job = set $job "service_account" (include "clincot.account" (dict "root" . "which" "trainer")) -}}
{{- $labels := merge (dict "app.kubernetes.io/component" "trainer" "sidecar.istio.io/inject" "false") (include "clincot.labels" . | fromYaml) -}}
{{- $job = set $job "pod_labels" (merge $labels .Values.pipeline.podLabels) -}}
{{- $job = set $job "user" (int .Values.podSecurity.user) -}}
{{- $job = set $job "group" (int .Values.podSecurity.group) -}}
{{- $job = set $job "queue" .Values.pipeline.queue -}}
{{- $job = set $job "timeout_s" (int (default $gpu.timeoutSeconds $node.timeout_s)) -}}
{{- with (default $gpu.shm $node.shm) }}{{- $job = set $job "shm" . -}}{{- end -}}
{{- $launch = mergeOverwrite (dict "how" "train-job" "job" $job) $launch -}}
{{- end -}}
{{- toYaml $launch -}}
{{- end }}

{{/* The stages of cluster.yaml. With trainJobs, `train` only waits for the TrainJob, so it gets the resources of a task
without a GPU. JSON. */}}
{{- define "clincot.stages" -}}
{{- $stages := deepCopy .Values.pipeline.stages -}}
{{- if .Values.pipeline.trainJobs -}}
{{- $cpu := .Values.pipeline.cpu -}}
{{- $waiting := dict "count" 0 "accelerator" "" "shm" "" "requests" $cpu.resources.requests "limits" $cpu.resources.limits -}}
{{- $waiting = set $waiting "node_selector" $cpu.nodeSelector -}}
{{- $waiting = set $waiting "tolerations" (include "clincot.clusterTolerations" $cpu.tolerations | fromJsonArray) -}}
{{- $stages = set $stages "train" (merge $waiting (pick (default dict (get $stages "train")) "timeout_s" "retries")) -}}
{{- end -}}
{{- range $name, $stage := $stages -}}
{{- if and (gt (int $stage.count) 0) (not $stage.accelerator) -}}
{{- $stages = set $stages $name (set $stage "accelerator" $.Values.pipeline.gpu.type) -}}
{{- else if and (not (hasKey $stage "count")) (not $stage.accelerator) -}}
{{- $stages = set $stages $name (omit $stage "accelerator") -}}
{{- end -}}
{{- end -}}
{{- toJson $stages -}}
{{- end }}

{{/* Secrets of the run pods, as in cluster.yaml. YAML. */}}
{{- define "clincot.runSecrets" -}}
{{- with include "clincot.storeKeys" . | fromJson }}
- name: {{ include "clincot.storeSecret" $ }}
  env: {{ toJson . }}
{{- end }}
{{- with include "clincot.gitSecret" . }}
- name: {{ . }}
  env: {username: CLINCOT_GIT_USER, password: CLINCOT_GIT_TOKEN}
  stages: [preflight, version]
{{- end }}
{{- range .Values.judges }}
{{- if .apiKeySecret }}
- name: {{ .apiKeySecret }}
  env: {key: {{ include "clincot.judgeKeyEnv" . }}}
  stages: [preflight, generate, judge]
{{- end }}
{{- end }}
{{- with .Values.server.smokeKeySecret }}
- name: {{ . }}
  env: {key: CLINCOT_SMOKE_KEY}
  stages: [deploy]
{{- end }}
{{- end }}

{{/* cluster.yaml, which pipelines/cluster_settings.py reads. YAML. */}}
{{- define "clincot.cluster" -}}
{{- $cpu := .Values.pipeline.cpu -}}
{{- $gpu := .Values.pipeline.gpu -}}
namespace: {{ .Values.kfp.runNamespace }}
service_account: {{ include "clincot.account" (dict "root" . "which" "runner") }}
images:
  cpu: {{ include "clincot.image" (dict "root" . "image" .Values.image.cpu) }}
  gpu: {{ include "clincot.image" (dict "root" . "image" .Values.image.cuda) }}
  pull_policy: {{ .Values.image.pullPolicy }}
  pull_secrets: {{ toJson .Values.global.imagePullSecrets }}
cpu:
  requests: {{ toJson $cpu.resources.requests }}
  limits: {{ toJson $cpu.resources.limits }}
  node_selector: {{ toJson $cpu.nodeSelector }}
  tolerations: {{ include "clincot.clusterTolerations" $cpu.tolerations }}
  timeout_s: {{ int $cpu.timeoutSeconds }}
  retries: {{ toJson .Values.pipeline.retries }}
gpu:
  requests: {{ toJson $gpu.resources.requests }}
  limits: {{ toJson $gpu.resources.limits }}
  accelerator: {{ ternary $gpu.type "" (gt (int $gpu.count) 0) | quote }}
  count: {{ int $gpu.count }}
  node_selector: {{ toJson $gpu.nodeSelector }}
  tolerations: {{ include "clincot.clusterTolerations" $gpu.tolerations }}
  shm: {{ $gpu.shm | quote }}
  timeout_s: {{ int $gpu.timeoutSeconds }}
  retries: {{ toJson .Values.pipeline.retries }}
stages: {{ include "clincot.stages" . }}
cache:
  claim: {{ include "clincot.cacheClaim" . | quote }}
  access_mode: {{ .Values.pipeline.cache.accessMode }}
env:
  AWS_ENDPOINT_URL_S3: {{ include "clincot.storeEndpoint" . | quote }}
  AWS_REGION: {{ .Values.store.region | quote }}
  AWS_DEFAULT_REGION: {{ .Values.store.region | quote }}
  {{- with .Values.proxy.http }}
  HTTP_PROXY: {{ . | quote }}
  {{- end }}
  {{- with .Values.proxy.https }}
  HTTPS_PROXY: {{ . | quote }}
  {{- end }}
  {{- if or .Values.proxy.http .Values.proxy.https }}
  NO_PROXY: {{ include "clincot.noProxy" . | quote }}
  {{- end }}
  {{- range $name, $value := .Values.pipeline.env }}
  {{ $name }}: {{ $value | quote }}
  {{- end }}
ca_config_map: {{ .Values.customCA.configMap | quote }}
secrets: {{ include "clincot.runSecrets" . | fromYamlArray | toJson }}
security: {user: {{ int .Values.podSecurity.user }}, group: {{ int .Values.podSecurity.group }}}
labels: {{ toJson (merge (dict "app.kubernetes.io/part-of" "clincot" "app.kubernetes.io/instance" .Release.Name "app.kubernetes.io/component" "run") .Values.pipeline.podLabels) }}
annotations: {{ toJson .Values.pipeline.podAnnotations }}
queue: {{ .Values.pipeline.queue | quote }}
wait_s: {{ int .Values.pipeline.waitSeconds }}
parallel_shards: {{ int .Values.pipeline.parallelShards }}
deadline_s: {{ int .Values.pipeline.deadlineSeconds }}
keep_s: {{ int .Values.pipeline.keepSeconds }}
{{- end }}

{{/* What becomes of a hook's Job. Helm 3.18 and later print the log of a failed hook, so the Job can be deleted;
earlier versions do not, so it is kept for a day. */}}
{{- define "clincot.hookPolicy" -}}
{{- if semverCompare ">=3.18.0-0" .Capabilities.HelmVersion.Version -}}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded,hook-failed
helm.sh/hook-output-log-policy: hook-failed
{{- else -}}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
{{- end }}

{{/* A container that runs `clincot` with access to the store. {root, name, args, resources, smoke, git} */}}
{{- define "clincot.step" -}}
- name: {{ .name }}
  image: {{ include "clincot.stepImage" (dict "root" .root "resources" .resources) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: {{ toJson .args }}
  env:
    {{- include "clincot.env" .root | nindent 4 }}
    - {name: CLINCOT_USER, value: {{ printf "%s/%s" .root.Release.Namespace .root.Release.Name | quote }}}
    {{- if and .smoke .root.Values.server.smokeKeySecret }}
    - name: CLINCOT_SMOKE_KEY
      valueFrom: {secretKeyRef: {name: {{ .root.Values.server.smokeKeySecret }}, key: key}}
    {{- end }}
    {{- if .git }}
    {{- with include "clincot.gitSecret" .root }}
    - name: CLINCOT_GIT_USER
      valueFrom: {secretKeyRef: {name: {{ . }}, key: username}}
    - name: CLINCOT_GIT_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: password}}
    {{- end }}
    {{- range .root.Values.judges }}
    {{- if .apiKeySecret }}
    - name: {{ include "clincot.judgeKeyEnv" . }}
      valueFrom: {secretKeyRef: {name: {{ .apiKeySecret }}, key: key}}
    {{- end }}
    {{- end }}
    {{- end }}
  resources:
    {{- toYaml .resources | nindent 4 }}
  securityContext:
    {{- include "clincot.containerSecurity" .root | nindent 4 }}
  volumeMounts:
    {{- include "clincot.mounts" .root | nindent 4 }}
{{- end }}

{{/* The image of a step: that with CUDA if its container gets a GPU, else that for CPUs, which is several GB smaller.
{root, resources} */}}
{{- define "clincot.stepImage" -}}
{{- $images := .root.Values.image -}}
{{- include "clincot.image" (dict "root" .root "image" (ternary $images.cuda $images.cpu (not (empty (include "clincot.usesGpu" .))))) -}}
{{- end }}

{{/* Whether resources contain a GPU: one of NVIDIA, or of a type that the values name. Not empty if they do.
{root, resources} */}}
{{- define "clincot.usesGpu" -}}
{{- $values := .root.Values -}}
{{- $types := list $values.pipeline.gpu.type $values.judgeDefaults.gpuType -}}
{{- range $values.judges -}}{{- $types = append $types .gpuType -}}{{- end -}}
{{- range $sizes := .resources -}}
{{- range $name, $size := $sizes -}}
{{- if and (or (hasPrefix "nvidia.com/" $name) (has $name $types)) (gt (include "clincot.quantity" $size | float64) 0.0) -}}
true
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Resources of the Job that rolls out the champion. A Job that publishes a checkpoint loads the model, so unless its
values say otherwise it gets what the model's container gets, and as many GPUs with vLLM. YAML. */}}
{{- define "clincot.rolloutResources" -}}
{{- $server := .Values.server -}}
{{- $loads := not (empty $server.first.checkpoint) -}}
{{- $small := dict "requests" (dict "cpu" "1" "memory" "2Gi") "limits" (dict "cpu" "2" "memory" "4Gi") -}}
{{- $gpus := ternary $server.gpus 0 (and $loads (eq $server.engine "vllm")) -}}
{{- if ne (toString $server.first.gpus) "auto" -}}{{- $gpus = $server.first.gpus -}}{{- end -}}
{{- $resources := default (ternary $server.resources $small $loads) $server.first.resources -}}
{{- include "clincot.withGpus" (dict "resources" $resources "type" .Values.pipeline.gpu.type "gpus" $gpus) -}}
{{- end }}

{{/* Settings of the Job's pod. With a GPU, it goes where the tasks with GPUs go, unless server.first.pod says otherwise.
JSON. */}}
{{- define "clincot.rolloutSettings" -}}
{{- $below := .Values.podDefaults -}}
{{- if include "clincot.usesGpu" (dict "root" . "resources" (include "clincot.rolloutResources" . | fromYaml)) -}}
{{- $below = include "clincot.podSettings" (dict "below" $below "own" (pick .Values.pipeline.gpu "nodeSelector" "tolerations")) | fromJson -}}
{{- end -}}
{{- include "clincot.podSettings" (dict "below" $below "own" .Values.server.first.pod) -}}
{{- end }}

{{/* Names of Jobs end with a digest of their pods, because the pods of a Job cannot be changed. */}}
{{- define "clincot.rolloutName" -}}
{{- printf "%s-rollout-%s" (include "clincot.fullname" .) (include "clincot.shapedRollout" . | sha256sum | trunc 10) -}}
{{- end }}

{{/* The settings of the policy's pods: server.pod, and the chart's own defaults. JSON. */}}
{{- define "clincot.serverPod" -}}
{{- $pod := deepCopy .Values.server.pod -}}
{{- if and (not $pod.affinity) (gt (int .Values.server.replicas) 1) -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (dict "clincot/service" (include "clincot.serverName" .))) -}}
{{- $preferred := list (dict "weight" 100 "podAffinityTerm" $term) -}}
{{- $pod = set $pod "affinity" (dict "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" $preferred)) -}}
{{- end -}}
{{- if ne .Values.server.engine "vllm" -}}{{- $pod = omit $pod "tolerations" -}}{{- end -}}
{{- $pod = set $pod "labels" (merge (dict) (default dict $pod.labels) (dict "sidecar.istio.io/inject" "false")) -}}
{{- toJson $pod -}}
{{- end }}

{{/* Arguments of vLLM: the own ones, and tensor parallelism over the replica's GPUs unless they set it. {gpus, args}. JSON. */}}
{{- define "clincot.vllmArguments" -}}
{{- $args := default list .args -}}
{{- if and (gt (int .gpus) 1) (not (regexMatch "--(tensor|pipeline|data)-parallel-size" (join " " $args))) -}}
{{- $args = prepend $args (printf "--tensor-parallel-size=%d" (int .gpus)) -}}
{{- end -}}
{{- toJson $args -}}
{{- end }}
