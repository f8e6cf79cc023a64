{{/* What the cluster must have, and values that contradict each other. Everything found is said at once. */}}

{{- define "clincot.needs" -}}
{{- $root := .root -}}
{{- if not ($root.Capabilities.APIVersions.Has .kind) -}}
{{- printf "\n- %s is not served by this cluster (%s). Install it first; offline: --api-versions %s" .kind .why .kind -}}
{{- end -}}
{{- end }}

{{- define "clincot.checks" -}}
{{- $found := "" -}}
{{- $need := dict "root" . -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "serving.kserve.io/v1beta1/InferenceService" "why" "KServe 0.20 or later") $need)) -}}
{{- if .Values.servingRuntime.create -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "serving.kserve.io/v1alpha1/ServingRuntime" "why" "KServe; or servingRuntime.create=false") $need)) -}}
{{- end -}}
{{- if .Values.pipeline.enabled -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "argoproj.io/v1alpha1/Workflow" "why" "Kubeflow Pipelines 2.15 or later; or pipeline.enabled=false") $need)) -}}
{{- end -}}
{{- if .Values.pipeline.trainJobs -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "trainer.kubeflow.org/v1alpha1/TrainJob" "why" "Kubeflow Trainer 2; or pipeline.trainJobs=false") $need)) -}}
{{- if not (include "clincot.cacheClaim" .) -}}
{{- $found = printf "%s\n- pipeline.trainJobs: inputs and checkpoint go over the cache, and there is none: set pipeline.cache.create, or existingClaim" $found -}}
{{- else if and (not .Values.pipeline.cache.existingClaim) (ne .Values.pipeline.cache.accessMode "ReadWriteMany") -}}
{{- $found = printf "%s\n- pipeline.trainJobs: pods on several nodes mount the cache, so pipeline.cache.accessMode must be ReadWriteMany, not %s" $found .Values.pipeline.cache.accessMode -}}
{{- end -}}
{{- else if or (eq (default "" .Values.pipeline.launch.how) "train-job") .Values.pipeline.launch.job -}}
{{- $found = printf "%s\n- pipeline.launch asks for a TrainJob: set pipeline.trainJobs, which gives the runner its rules" $found -}}
{{- end -}}
{{- if .Values.monitoring.serviceMonitor -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "monitoring.coreos.com/v1/ServiceMonitor" "why" "the Prometheus operator; or monitoring.serviceMonitor=false") $need)) -}}
{{- end -}}
{{- if .Values.monitoring.rules.enabled -}}
{{- $found = printf "%s%s" $found (include "clincot.needs" (merge (dict "kind" "monitoring.coreos.com/v1/PrometheusRule" "why" "the Prometheus operator; or monitoring.rules.enabled=false") $need)) -}}
{{- end -}}
{{- if and .Values.store.existingSecret (or .Values.store.accessKey .Values.store.secretKey) -}}
{{- $found = printf "%s\n- store.existingSecret and store.accessKey/secretKey are both given; say one" $found -}}
{{- end -}}
{{- if not (or .Values.store.existingSecret (and .Values.store.accessKey .Values.store.secretKey)) -}}
{{- $found = printf "%s\n- the object store's keys are missing: set store.existingSecret (a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or for a trial store.accessKey and store.secretKey" $found -}}
{{- end -}}
{{- if and .Values.git.existingSecret .Values.git.password -}}
{{- $found = printf "%s\n- git.existingSecret and git.password are both given; say one" $found -}}
{{- end -}}
{{- if and .Values.seaweedfs.enabled .Values.store.endpoint -}}
{{- $found = printf "%s\n- seaweedfs.enabled brings its own endpoint, but store.endpoint is %q; say one" $found .Values.store.endpoint -}}
{{- end -}}
{{- if and .Values.server.apiKeysSecret (not .Values.server.smokeKeySecret) -}}
{{- $found = printf "%s\n- with server.apiKeysSecret, smoke requests need a key: set server.smokeKeySecret" $found -}}
{{- end -}}
{{- if and .Values.seaweedfs.enabled (not (and .Values.store.accessKey .Values.store.secretKey)) -}}
{{- $found = printf "%s\n- seaweedfs.enabled makes its identity from store.accessKey and store.secretKey: set both" $found -}}
{{- end -}}
{{- if not (or .Values.servingRuntime.create .Values.servingRuntime.name) -}}
{{- $found = printf "%s\n- servingRuntime.create is false: set servingRuntime.name to the one that is there" $found -}}
{{- end -}}
{{- if and .Values.pipeline.enabled .Values.pipeline.schedule.enabled (not (and .Values.pipeline.data .Values.pipeline.benchmark)) -}}
{{- $found = printf "%s\n- pipeline.schedule.enabled: a recurring run needs pipeline.data and pipeline.benchmark (clincot pipeline put prints such addresses)" $found -}}
{{- end -}}
{{- if and .Values.quota.enabled (eq .Values.kfp.runNamespace .Values.kfp.namespace) -}}
{{- $found = printf "%s\n- quota.enabled would limit Kubeflow Pipelines itself in %s: give runs a namespace of their own (kfp.runNamespace)" $found .Values.kfp.namespace -}}
{{- end -}}
{{- if $found -}}
{{- fail (printf "\nclincot cannot be installed like this:%s" $found) -}}
{{- end -}}
{{- end }}
