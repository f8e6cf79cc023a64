{{/* The text that `helm install` prints at its end. It is a named template, so that tests can render it without a cluster. */}}
{{- define "clincot.notes" -}}
{{- $name := include "clincot.fullname" . -}}
{{- $namespaces := include "clincot.namespaces" . | fromJsonArray | join " and " -}}
{{- $judges := list -}}
{{- range (default dict (include "clincot.params" . | fromYaml).judge).judges -}}
{{- $judges = append $judges .name -}}
{{- end -}}
{{- $empty := list -}}
{{- range $key := list "data" "benchmark" -}}
{{- if not (get $.Values.pipeline $key) -}}{{- $empty = append $empty (printf "pipeline.%s" $key) -}}{{- end -}}
{{- end -}}
ClinCoT {{ .Chart.AppVersion }} is installed in the namespace {{ .Release.Namespace }}; its pipeline runs use the namespace {{ .Values.kfp.runNamespace }}.

  store       Checkpoints and records are kept in {{ include "clincot.storeUrl" . }} at {{ include "clincot.storeEndpoint" . }}.
              {{- if .Values.seaweedfs.enabled }}
              This is the SeaweedFS server of this release, which is for trials, not for production.
              {{- end }}
  keys        {{ if .Values.store.workloadIdentity }}The pods read the store with the identities of their service accounts.{{ else if .Values.store.existingSecret }}The store's keys are read from the Secret {{ .Values.store.existingSecret }}, which must exist in {{ $namespaces }}.{{ else }}The chart created the Secret {{ include "clincot.storeSecret" . }} with the store's keys in {{ $namespaces }}.{{ end }}
  data        {{ if .Values.git.url }}Each round commits its preference data to {{ .Values.git.url }}.{{ else }}Rounds keep no version of their preference data; set git.url to a data repository to change this.{{ end }}
  judges      {{ if $judges }}The panel consists of {{ join ", " $judges }}.{{ else }}No judges are configured, but a round needs at least two; set judges or pipeline.recipe.{{ end }}
  pipeline    {{ if .Values.pipeline.enabled }}{{ include "clincot.pipelineName" . }} is uploaded to {{ include "clincot.kfpEndpoint" . }}{{ if .Values.pipeline.schedule.enabled }} and runs on the schedule "{{ .Values.pipeline.schedule.cron }}" (with seconds).{{ else }}; no recurring run is scheduled (pipeline.schedule.enabled).{{ end }}{{ else }}No pipeline is uploaded (pipeline.enabled is false).{{ end }}
  endpoint    The model {{ include "clincot.serverName" . }} is served by {{ .Values.server.replicas }} replica{{ if gt (int .Values.server.replicas) 1 }}s{{ end }} with the engine {{ .Values.server.engine }}, after its first rollout.
{{- $target := include "clincot.routeTarget" . | fromJson }}
{{- if $target.kind }}
  route       Users reach it at https://{{ join " and https://" .Values.server.route.hosts }}{{ if not .Values.server.apiKeysSecret }}, and need no key (server.apiKeysSecret is empty){{ end }}.
{{- if and .Values.networkPolicy.enabled (eq $target.kind "endpoint") (not .Values.networkPolicy.ingressController) }}
              Only the peers of networkPolicy.gateway can forward requests, because networkPolicy.ingressController is empty.
{{- end }}
{{- end }}
{{- $ownContainer := eq (include "clincot.storageContainer" .) (include "clincot.ownStorageContainer" .) }}
{{- if and .Values.store.existingSecret (not $ownContainer) }}

KServe reads the address of the store from annotations of the Secret in {{ .Release.Namespace }}. Add them once:

  kubectl -n {{ .Release.Namespace }} annotate --overwrite secret {{ .Values.store.existingSecret }}
  {{- range $key, $value := include "clincot.storeAnnotations" . | fromYaml }} \
    {{ $key }}={{ $value }}
  {{- end }}
{{- end }}
{{- if not .Values.rbac.create }}

The chart created no Roles (rbac.create is false). Give the service accounts those that it would create. To print them:

  helm template {{ .Release.Name }} charts/clincot -n {{ .Release.Namespace }} -f YOUR-VALUES --set rbac.create=true \
    --show-only templates/rbac.yaml {{ ternary "--dry-run=server" "--validate" (semverCompare ">=4.0.0-0" .Capabilities.HelmVersion.Version) }}
{{- end }}
{{- if and (not .Values.serviceAccounts.create) (not .Values.store.workloadIdentity) }}

KServe reads the store with the keys in {{ include "clincot.storeSecret" . }}, which the account {{ include "clincot.account" (dict "root" . "which" "server") }} must name:

  kubectl -n {{ .Release.Namespace }} patch serviceaccount {{ include "clincot.account" (dict "root" . "which" "server") }} --patch '{"secrets": [{"name": "{{ include "clincot.storeSecret" . }}"}]}'
{{- end }}

Next steps:
{{- if .Values.tests.enabled }}

  # check everything that a round needs; each failed check is printed with its remedy
  {{- if eq .Release.Namespace .Values.kfp.runNamespace }}
  helm test {{ .Release.Name }} -n {{ .Release.Namespace }} --logs
  {{- else }}
  helm test {{ .Release.Name }} -n {{ .Release.Namespace }}
  kubectl -n {{ .Values.kfp.runNamespace }} logs {{ $name }}-preflight
  {{- if .Values.tests.endpoint }}
  kubectl -n {{ .Release.Namespace }} logs {{ $name }}-ask
  {{- end }}
  {{- end }}
{{- end }}
{{- if .Values.server.first.enabled }}

  # follow the rollout of the champion to the endpoint
  kubectl -n {{ .Release.Namespace }} logs -f job/{{ include "clincot.rolloutName" . }}
{{- else }}

  # upload a base model with `clincot pipeline put FOLDER s3://{{ .Values.store.bucket }}/models`, then serve the printed ADDRESS
  helm upgrade {{ .Release.Name }} charts/clincot -n {{ .Release.Namespace }} --reuse-values \
    --set server.first.enabled=true,server.first.checkpoint=ADDRESS
{{- end }}

  # show the state and the address of the endpoint
  kubectl -n {{ .Release.Namespace }} get inferenceservice
{{- if and .Values.pipeline.enabled $empty }}

{{ join " and " $empty }} {{ ternary "is" "are" (eq (len $empty) 1) }} empty. Upload the data with `clincot pipeline put FOLDER s3://{{ .Values.store.bucket }}/data`
and set the printed address, or enter an address in the Kubeflow UI for each run.
{{- end }}

If the release served a model under another name before, that one serves until the model {{ include "clincot.serverName" . }} has been rolled out; then the
rollout removes it.

`helm uninstall` removes the recurring run, but models that rounds deployed keep serving as long as their pods run. Delete
them with
  kubectl -n {{ .Release.Namespace }} delete inferenceservice,service -l clincot/release={{ .Release.Name }}
{{- end }}
