{{/* What `helm install` says at its end; a template of its own, so that it can be shown without a cluster. */}}
{{- define "clincot.notes" -}}
{{- $name := include "clincot.fullname" . -}}
ClinCoT {{ .Chart.AppVersion }} in {{ .Release.Namespace }}, its runs in {{ .Values.kfp.runNamespace }}.

  store       {{ include "clincot.storeUrl" . }} at {{ include "clincot.storeEndpoint" . }}
              {{- if .Values.seaweedfs.enabled }} (SeaweedFS of this release: for trials, not for production){{ end }}
  keys        Secret {{ include "clincot.storeSecret" . }}{{ if .Values.store.existingSecret }}, which must exist in {{ include "clincot.namespaces" . | fromJsonArray | join " and " }}{{ end }}
  data        {{ default "no data repository: rounds keep no version of their preference data (git.url)" .Values.git.url }}
  judges      {{ if .Values.judges }}{{ range $n, $judge := .Values.judges }}{{ if $n }}, {{ end }}{{ $judge.name }}{{ end }}{{ else }}none: a round needs at least two (judges){{ end }}
  pipeline    {{ if .Values.pipeline.enabled }}{{ .Values.pipeline.name }} at {{ include "clincot.kfpEndpoint" . }}, {{ ternary (printf "every %s" .Values.pipeline.schedule.cron) "no recurring run (pipeline.schedule.enabled)" .Values.pipeline.schedule.enabled }}{{ else }}not uploaded (pipeline.enabled){{ end }}
  endpoint    model {{ .Values.server.name }}, {{ .Values.server.replicas }} x {{ .Values.server.engine }}
{{- if and .Values.store.existingSecret }}

KServe reads the store by annotations of that Secret; in {{ .Release.Namespace }} it must carry them once:

  kubectl -n {{ .Release.Namespace }} annotate --overwrite secret {{ .Values.store.existingSecret }}
  {{- range $key, $value := include "clincot.storeAnnotations" . | fromYaml }} \
    {{ $key }}={{ $value }}
  {{- end }}
{{- end }}

Next:

  helm test {{ .Release.Name }} -n {{ .Release.Namespace }} --logs         # everything that a round needs, with the mend of what is missing
{{- if .Values.server.first.enabled }}
  kubectl -n {{ .Release.Namespace }} logs -f job/{{ $name }}-rollout-{{ .Release.Revision }}   # the champion's way to the endpoint
{{- else }}
  # publish a base model and make it champion, then: --set server.first.enabled=true
{{- end }}
  kubectl -n {{ .Release.Namespace }} get inferenceservice
{{- if and .Values.pipeline.enabled (not .Values.pipeline.data) }}

pipeline.data and pipeline.benchmark are empty: runs must be given them in the UI.
{{- end }}

`helm uninstall` removes the recurring run. What rounds deployed goes on serving until it is deleted:
  kubectl -n {{ .Release.Namespace }} delete inferenceservice,service -l clincot/service={{ .Values.server.name }}
{{- end }}
