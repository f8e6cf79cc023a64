{{/* What operators set for pods: one block with the same keys for every workload (definitions.pod of values.schema.json),
and one template that applies it. */}}

{{/* The settings `own`, each of which replaces the one of the same name in `below`. {below, own}. JSON. */}}
{{- define "clincot.podSettings" -}}
{{- $out := deepCopy (default dict .below) -}}
{{- range $key, $value := default dict .own -}}
{{- $out = set $out $key $value -}}
{{- end -}}
{{- toJson $out -}}
{{- end }}

{{/* The pod that the named template `template` renders from `context` (its metadata and spec), with the settings `pod` of
the operator. Labels by which the chart's objects select pods cannot be changed. {root, template, context, pod}. YAML. */}}
{{- define "clincot.shapedPod" -}}
{{- $rendered := include .template .context | fromYaml -}}
{{- if $rendered.Error -}}
{{- fail (printf "the template %s is no YAML: %s" .template $rendered.Error) -}}
{{- end -}}
{{- $pod := .pod -}}
{{- $metadata := default dict $rendered.metadata -}}
{{- $labels := default dict $metadata.labels -}}
{{- $fixed := pick $labels "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/part-of" "app.kubernetes.io/component" -}}
{{- $labels = merge (deepCopy $fixed) (default dict $pod.labels) $labels -}}
{{- $metadata = set $metadata "labels" $labels -}}
{{- with merge (dict) (default dict $pod.annotations) (default dict $metadata.annotations) -}}
{{- $metadata = set $metadata "annotations" . -}}
{{- end -}}
{{- $spec := include "clincot.shapedSpec" (dict "spec" $rendered.spec "pod" $pod "root" .root) | fromYaml -}}
{{- toYaml (dict "metadata" $metadata "spec" $spec) -}}
{{- end }}

{{/* The pod spec `spec` with the settings `pod`; `spec` may also be the predictor of an InferenceService. {root, spec, pod}.
YAML. */}}
{{- define "clincot.shapedSpec" -}}
{{- $pod := .pod -}}
{{- $spec := .spec -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" -}}
{{- with get $pod $key -}}{{- $spec = set $spec $key . -}}{{- end -}}
{{- end -}}
{{- $secrets := list -}}
{{- range concat (default list .root.Values.global.imagePullSecrets) (default list $pod.imagePullSecrets) | uniq -}}
{{- $secrets = append $secrets (dict "name" .) -}}
{{- end -}}
{{- with $secrets -}}{{- $spec = set $spec "imagePullSecrets" . -}}{{- end -}}
{{- if $spec.securityContext -}}
{{- $user := .root.Values.podSecurity -}}
{{- $context := dict -}}
{{- if $user.user -}}
{{- $context = dict "runAsUser" $user.user "runAsGroup" $user.group "fsGroup" $user.group -}}
{{- end -}}
{{- $context = include "clincot.podSettings" (dict "below" (merge $context $spec.securityContext) "own" $pod.securityContext) | fromJson -}}
{{- $spec = set $spec "securityContext" $context -}}
{{- end -}}
{{- with $pod.volumes -}}{{- $spec = set $spec "volumes" (concat (default list $spec.volumes) .) -}}{{- end -}}
{{- range $key := list "initContainers" "containers" -}}
{{- if get $spec $key -}}
{{- $shaped := list -}}
{{- range get $spec $key -}}
{{- $shaped = append $shaped (include "clincot.shapedContainer" (dict "container" . "pod" $pod) | fromYaml) -}}
{{- end -}}
{{- $spec = set $spec $key $shaped -}}
{{- end -}}
{{- end -}}
{{- if $spec.model -}}
{{- $spec = set $spec "model" (include "clincot.shapedContainer" (dict "container" $spec.model "pod" $pod) | fromYaml) -}}
{{- end -}}
{{- toYaml $spec -}}
{{- end }}

{{- define "clincot.shapedContainer" -}}
{{- $container := .container -}}
{{- range $key := list "env" "volumeMounts" -}}
{{- with get $.pod $key -}}{{- $container = set $container $key (concat (default list (get $container $key)) .) -}}{{- end -}}
{{- end -}}
{{- with .pod.containerSecurityContext -}}
{{- $context := include "clincot.podSettings" (dict "below" $container.securityContext "own" .) | fromJson -}}
{{- $container = set $container "securityContext" $context -}}
{{- end -}}
{{- toYaml $container -}}
{{- end }}
