{{/* Fail if the cluster lacks an API or if values contradict each other, with all errors in one message. Helm renders
the deepest templates first, so templates/validation/checks.yaml comes before any template that relies on it. */}}

{{- define "clincot.needs" -}}
{{- $root := .root -}}
{{- if not ($root.Capabilities.APIVersions.Has .kind) -}}
{{- printf "\n- %s is not served by this cluster: %s. To render without a cluster, pass --api-versions %s" .kind .remedy .kind -}}
{{- end -}}
{{- end }}

{{- define "clincot.checks" -}}
{{- with (include "clincot.problems" .) -}}
{{- fail (printf "\nclincot cannot be installed with these values on this cluster:%s" .) -}}
{{- end -}}
{{- end }}

{{/* One line for each error, empty if there is none. */}}
{{- define "clincot.problems" -}}
{{- $errors := "" -}}
{{- $need := dict "root" . -}}
{{- $target := include "clincot.routeTarget" . | fromJson -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "serving.kserve.io/v1beta1/InferenceService" "remedy" "install KServe 0.20 or later") $need)) -}}
{{- if .Values.servingRuntime.create -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "serving.kserve.io/v1alpha1/ServingRuntime" "remedy" "install KServe, or set servingRuntime.create=false") $need)) -}}
{{- end -}}
{{- if .Values.server.storageInitializer.create -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "serving.kserve.io/v1alpha1/ClusterStorageContainer" "remedy" "install KServe 0.20 or later, or set server.storageInitializer.create=false") $need)) -}}
{{- end -}}
{{- if .Values.pipeline.enabled -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "argoproj.io/v1alpha1/Workflow" "remedy" "install Kubeflow Pipelines 2.17 or later, or set pipeline.enabled=false") $need)) -}}
{{- end -}}
{{- if .Values.pipeline.trainJobs -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "trainer.kubeflow.org/v1alpha1/TrainJob" "remedy" "install Kubeflow Trainer 2, or set pipeline.trainJobs=false") $need)) -}}
{{- if not (include "clincot.cacheClaim" .) -}}
{{- $errors = printf "%s\n- pipeline.trainJobs passes inputs and checkpoint through the cache, but there is no cache volume: set pipeline.cache.create or pipeline.cache.existingClaim" $errors -}}
{{- else if and (not .Values.pipeline.cache.existingClaim) (ne .Values.pipeline.cache.accessMode "ReadWriteMany") -}}
{{- $errors = printf "%s\n- pipeline.trainJobs mounts the cache on several nodes: expected pipeline.cache.accessMode ReadWriteMany, got %s" $errors .Values.pipeline.cache.accessMode -}}
{{- end -}}
{{- else if or (eq (default "" .Values.pipeline.launch.how) "train-job") (hasKey .Values.pipeline.launch "job") -}}
{{- $errors = printf "%s\n- pipeline.launch configures a TrainJob: set pipeline.trainJobs, which gives the runner the permissions for it" $errors -}}
{{- end -}}
{{- if .Values.monitoring.serviceMonitor -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "monitoring.coreos.com/v1/ServiceMonitor" "remedy" "install the Prometheus operator, or set monitoring.serviceMonitor=false") $need)) -}}
{{- end -}}
{{- if .Values.monitoring.rules.enabled -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "monitoring.coreos.com/v1/PrometheusRule" "remedy" "install the Prometheus operator, or set monitoring.rules.enabled=false") $need)) -}}
{{- end -}}
{{- if .Values.judgeDefaults.schedule.enabled -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "keda.sh/v1alpha1/ScaledObject" "remedy" "install KEDA, or set judgeDefaults.schedule.enabled=false") $need)) -}}
{{- end -}}
{{- if ge (int .Values.server.pdb.minAvailable) (int .Values.server.replicas) -}}
{{- $errors = printf "%s\n- server.pdb.minAvailable is %d and server.replicas %d, so no node with a replica could be drained; expected fewer than the replicas" $errors (int .Values.server.pdb.minAvailable) (int .Values.server.replicas) -}}
{{- end -}}
{{- $deadline := default 60 .Values.server.settings.deadline_s -}}
{{- if lt (float64 .Values.server.graceSeconds) (float64 $deadline) -}}
{{- $errors = printf "%s\n- server.graceSeconds is %d, but a request may take server.settings.deadline_s, which is %v seconds; a pod that ends would cut it off, so expected server.graceSeconds to be at least as long" $errors (int .Values.server.graceSeconds) $deadline -}}
{{- end -}}
{{- if and .Values.server.grpc (eq .Values.server.mode "knative") -}}
{{- $errors = printf "%s\n- server.grpc needs a second port, and Knative allows one in a pod: set server.grpc=false, or server.mode to standard or blue-green" $errors -}}
{{- end -}}
{{- if and .Values.store.existingSecret (or .Values.store.accessKey .Values.store.secretKey) -}}
{{- $errors = printf "%s\n- store.existingSecret and store.accessKey/secretKey are both set; set only one of them" $errors -}}
{{- end -}}
{{- if and .Values.store.workloadIdentity (or .Values.store.existingSecret .Values.store.accessKey .Values.store.secretKey) -}}
{{- $errors = printf "%s\n- store.workloadIdentity needs no keys, but store.existingSecret or store.accessKey is set; set only one of them" $errors -}}
{{- end -}}
{{- if and .Values.seaweedfs.changeOwner (not .Values.podSecurity.user) -}}
{{- $errors = printf "%s\n- seaweedfs.changeOwner needs a user: set podSecurity.user" $errors -}}
{{- end -}}
{{- if not (or .Values.store.workloadIdentity .Values.store.existingSecret (and .Values.store.accessKey .Values.store.secretKey)) -}}
{{- $errors = printf "%s\n- the object store's keys are missing: set store.existingSecret (a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or, for a trial, store.accessKey and store.secretKey" $errors -}}
{{- end -}}
{{- range $rule, $egress := .Values.networkPolicy.extraEgress -}}
{{- range $egress.ports -}}
{{- if and .endPort (lt (int .endPort) (int .port)) -}}
{{- $errors = printf "%s\n- networkPolicy.extraEgress[%d]: endPort %d is below port %d; a range goes from port to endPort" $errors $rule (int .endPort) (int .port) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.git.existingSecret .Values.git.password -}}
{{- $errors = printf "%s\n- git.existingSecret and git.password are both set; set only one of them" $errors -}}
{{- end -}}
{{- if and .Values.seaweedfs.enabled .Values.store.endpoint -}}
{{- $errors = printf "%s\n- seaweedfs.enabled provides its own endpoint, but store.endpoint is %q; set only one of them" $errors .Values.store.endpoint -}}
{{- end -}}
{{- if and .Values.server.apiKeysSecret (not .Values.server.smokeKeySecret) -}}
{{- $errors = printf "%s\n- server.apiKeysSecret is set, so smoke requests need a key: set server.smokeKeySecret" $errors -}}
{{- end -}}
{{- if and .Values.seaweedfs.enabled (not (and .Values.store.accessKey .Values.store.secretKey)) -}}
{{- $errors = printf "%s\n- seaweedfs.enabled creates its user from store.accessKey and store.secretKey: set both" $errors -}}
{{- end -}}
{{- if not (or .Values.servingRuntime.create .Values.servingRuntime.name) -}}
{{- $errors = printf "%s\n- servingRuntime.create is false: set servingRuntime.name to an existing (Cluster)ServingRuntime for vLLM" $errors -}}
{{- end -}}
{{- if and (not .Values.servingRuntime.create) (ne .Values.server.engine "vllm") -}}
{{- $errors = printf "%s\n- server.engine is %s, but servingRuntime.name is a runtime for vLLM; set servingRuntime.create=true, or server.engine=vllm" $errors .Values.server.engine -}}
{{- end -}}
{{- if and .Values.judges (hasKey (default dict (get .Values.pipeline.params "judge")) "judges") -}}
{{- $errors = printf "%s\n- judges and pipeline.params.judge.judges are both set; set only one of them" $errors -}}
{{- end -}}
{{- if and .Values.pipeline.enabled .Values.pipeline.schedule.enabled (not (and .Values.pipeline.data .Values.pipeline.benchmark)) -}}
{{- $errors = printf "%s\n- pipeline.schedule.enabled: a recurring run needs pipeline.data and pipeline.benchmark; set both to addresses that `clincot pipeline put` printed" $errors -}}
{{- end -}}
{{- $errors = printf "%s%s" $errors (include "clincot.accountProblems" .) -}}
{{- if eq .Values.server.route.kind "HTTPRoute" -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "gateway.networking.k8s.io/v1/HTTPRoute" "remedy" "install the Gateway API 1.2 or later, or set another server.route.kind") $need)) -}}
{{- if and $target.kind (ne $target.namespace .Release.Namespace) -}}
{{- $errors = printf "%s%s" $errors (include "clincot.needs" (merge (dict "kind" "gateway.networking.k8s.io/v1beta1/ReferenceGrant" "remedy" "install the Gateway API 1.2 or later") $need)) -}}
{{- end -}}
{{- end -}}
{{- $errors = printf "%s%s" $errors (include "clincot.routeProblems" .) -}}
{{- if and .Values.quota.enabled (eq .Values.kfp.runNamespace .Values.kfp.namespace) -}}
{{- $errors = printf "%s\n- quota.enabled would also limit Kubeflow Pipelines in the namespace %s: set kfp.runNamespace to a namespace for runs only" $errors .Values.kfp.namespace -}}
{{- end -}}
{{- with .Values.pipeline.recipe -}}
{{- if not ($.Files.Get (printf "recipes/%s.yaml" .)) -}}
{{- $names := list -}}
{{- range $path, $_ := $.Files.Glob "recipes/*.yaml" -}}
{{- $names = append $names (trimSuffix ".yaml" (base $path)) -}}
{{- end -}}
{{- $errors = printf "%s\n- pipeline.recipe: no recipe is called %q; the chart has: %s" $errors . (join ", " $names) -}}
{{- end -}}
{{- end -}}
{{- $errors = printf "%s%s" $errors (include "clincot.limitProblems" .) -}}
{{- $errors -}}
{{- end }}

{{/* One line for each service account that does not exist, would be created twice, or is everybody's. */}}
{{- define "clincot.accountProblems" -}}
{{- $names := .Values.serviceAccounts.names -}}
{{- $missing := list -}}
{{- $known := dict -}}
{{- range $which, $namespace := include "clincot.accounts" . | fromJson -}}
{{- $name := include "clincot.account" (dict "root" $ "which" $which) -}}
{{- $place := printf "%s/%s" $namespace $name -}}
{{- if eq $name "default" -}}
{{- printf "\n- serviceAccounts.names.%s is default, the account of every pod that names none; expected an account of its own" $which -}}
{{- end -}}
{{- if not (or $.Values.serviceAccounts.create (get $names $which)) -}}
{{- $missing = append $missing (printf "%s (in %s)" $which $namespace) -}}
{{- end -}}
{{- if and $.Values.serviceAccounts.create (hasKey $known $place) -}}
{{- printf "\n- serviceAccounts.names: %s and %s are both %s in the namespace %s, which would be created twice; expected two names, or serviceAccounts.create=false" (get $known $place) $which $name $namespace -}}
{{- end -}}
{{- $known = set $known $place $which -}}
{{- end -}}
{{- if not .Values.serviceAccounts.create -}}
{{- range $which, $annotations := .Values.serviceAccounts.annotations -}}
{{- if $annotations -}}
{{- printf "\n- serviceAccounts.annotations.%s is set, but the chart creates no account with serviceAccounts.create=false; annotate the existing one instead" $which -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.kfp.extraClusterRole (not .Values.rbac.create) -}}
{{- printf "\n- kfp.extraClusterRole is %s, but the chart binds no role with rbac.create=false; bind it yourself instead" .Values.kfp.extraClusterRole -}}
{{- end -}}
{{- with $missing -}}
{{- printf "\n- serviceAccounts.create is false, so set serviceAccounts.names to existing accounts for %s" (join ", " .) -}}
{{- end -}}
{{- end }}
