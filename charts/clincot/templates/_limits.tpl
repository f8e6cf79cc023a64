{{/* Numbers that contradict each other: requests above limits, waits that outlast tasks, tasks that share a disk, blocks
of addresses. */}}

{{/* A Kubernetes quantity as a number: "500m" is 0.5. */}}
{{- define "clincot.quantity" -}}
{{- $number := regexFind "^[0-9.]+" (toString .) -}}
{{- $factors := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (float64 $number) (get $factors (trimPrefix $number (toString .))) -}}
{{- end }}

{{/* A line for each request above its limit, anywhere in the values. {in, path} */}}
{{- define "clincot.requestsAboveLimits" -}}
{{- $path := .path -}}
{{- if kindIs "map" .in -}}
{{- $requests := get .in "requests" -}}
{{- $limits := get .in "limits" -}}
{{- if and (kindIs "map" $requests) (kindIs "map" $limits) -}}
{{- range $name, $request := $requests -}}
{{- $limit := get $limits $name -}}
{{- if $limit -}}
{{- if gt (include "clincot.quantity" $request | float64) (include "clincot.quantity" $limit | float64) -}}
{{- printf "\n- %s: the request of %s, %v, is above its limit, %v" $path $name $request $limit -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := .in -}}
{{- include "clincot.requestsAboveLimits" (dict "in" $value "path" (trimPrefix "." (printf "%s.%s" $path $key))) -}}
{{- end -}}
{{- else if kindIs "slice" .in -}}
{{- range $index, $value := .in -}}
{{- include "clincot.requestsAboveLimits" (dict "in" $value "path" (printf "%s[%d]" $path $index)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The binary digits of a network: "10.1.0.0/16" -> "4:0000101000000001"; of IPv6 with "6:". */}}
{{- define "clincot.networkBits" -}}
{{- $address := first (splitList "/" .) -}}
{{- $bits := "" -}}
{{- if contains ":" . -}}
{{- $digits := dict "0" "0000" "1" "0001" "2" "0010" "3" "0011" "4" "0100" "5" "0101" "6" "0110" "7" "0111" "8" "1000" "9" "1001" "a" "1010" "b" "1011" "c" "1100" "d" "1101" "e" "1110" "f" "1111" -}}
{{- $halves := splitList "::" $address -}}
{{- $groups := compact (splitList ":" (first $halves)) -}}
{{- if eq (len $halves) 2 -}}
{{- $last := compact (splitList ":" (last $halves)) -}}
{{- $between := int (sub 8 (add (len $groups) (len $last))) -}}
{{- $groups = concat $groups (compact (splitList ":" (repeat $between "0:"))) $last -}}
{{- end -}}
{{- range $groups -}}
{{- range splitList "" (printf "%s%s" (repeat (int (sub 4 (len .))) "0") (lower .)) -}}
{{- $bits = printf "%s%s" $bits (get $digits .) -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- range splitList "." $address -}}
{{- $bits = printf "%s%08b" $bits (atoi .) -}}
{{- end -}}
{{- end -}}
{{- printf "%s:%s" (ternary "6" "4" (contains ":" .)) (trunc (atoi (last (splitList "/" .))) $bits) -}}
{{- end }}

{{/* A line for each exception that is not inside its block, anywhere in the values. {in, path} */}}
{{- define "clincot.blocksOutside" -}}
{{- $path := .path -}}
{{- if kindIs "map" .in -}}
{{- $block := .in -}}
{{- range (ternary $block.except list (and (hasKey $block "cidr") (hasKey $block "except"))) -}}
{{- $outer := include "clincot.networkBits" $block.cidr -}}
{{- $inner := include "clincot.networkBits" . -}}
{{- if or (not (hasPrefix $outer $inner)) (eq $outer $inner) -}}
{{- printf "\n- %s: the exception %s is not inside the block %s" $path . $block.cidr -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := .in -}}
{{- include "clincot.blocksOutside" (dict "in" $value "path" (printf "%s.%s" $path $key)) -}}
{{- end -}}
{{- else if kindIs "slice" .in -}}
{{- range $index, $value := .in -}}
{{- include "clincot.blocksOutside" (dict "in" $value "path" (printf "%s[%d]" $path $index)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A line for each container that gets a GPU and cannot use one, or needs one and gets none: the chart's vLLM is built
for CUDA, and `clincot serve` for CPUs. */}}
{{- define "clincot.gpuProblems" -}}
{{- $server := .Values.server -}}
{{- $without := dict "pipeline.hook.resources" .Values.pipeline.hook.resources "monitoring.resources" .Values.monitoring.resources "seaweedfs.resources" .Values.seaweedfs.resources "server.frontResources" $server.frontResources "server.storageInitializer.resources" $server.storageInitializer.resources -}}
{{- if ne $server.engine "vllm" -}}{{- $without = set $without "server.resources" $server.resources -}}{{- end -}}
{{- range $path, $resources := $without -}}
{{- if include "clincot.usesGpu" (dict "root" $ "resources" $resources) -}}
{{- printf "\n- %s requests a GPU, which the container could not use; expected CPU and memory%s" $path (ternary ", or server.engine=vllm" "" (eq $path "server.resources")) -}}
{{- end -}}
{{- end -}}
{{- if .Values.servingRuntime.create -}}
{{- $models := list -}}
{{- if eq $server.engine "vllm" -}}
{{- $models = append $models (dict "path" "server.gpus" "gpus" $server.gpus "resources" $server.resources) -}}
{{- end -}}
{{- $all := .Values.judgeDefaults -}}
{{- range .Values.judges -}}
{{- if .modelUri -}}
{{- $models = append $models (dict "path" (printf "gpus of the judge %s" .name) "gpus" (ternary .gpus $all.gpus (hasKey . "gpus")) "resources" (default $all.resources .resources)) -}}
{{- end -}}
{{- end -}}
{{- range $models -}}
{{- if not (or (gt (int .gpus) 0) (include "clincot.usesGpu" (dict "root" $ "resources" .resources))) -}}
{{- printf "\n- %s is 0, but the chart's vLLM runs on GPUs only; expected at least 1, or a runtime of your own for CPUs (servingRuntime.create=false)" .path -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A line for each contradiction. */}}
{{- define "clincot.limitProblems" -}}
{{- $values := omit (deepCopy .Values) "extraObjects" -}}
{{- include "clincot.requestsAboveLimits" (dict "in" $values "path" "") -}}
{{- include "clincot.blocksOutside" (dict "in" .Values.networkPolicy "path" "networkPolicy") -}}
{{- include "clincot.gpuProblems" . -}}
{{- $pipeline := .Values.pipeline -}}
{{- $timeouts := dict "pipeline.cpu.timeoutSeconds" $pipeline.cpu.timeoutSeconds "pipeline.gpu.timeoutSeconds" $pipeline.gpu.timeoutSeconds -}}
{{- range $name, $stage := $pipeline.stages -}}
{{- if hasKey $stage "timeout_s" -}}{{- $timeouts = set $timeouts (printf "pipeline.stages.%s.timeout_s" $name) $stage.timeout_s -}}{{- end -}}
{{- end -}}
{{- range $name, $seconds := $timeouts -}}
{{- if ge (int $pipeline.waitSeconds) (int $seconds) -}}
{{- printf "\n- %s is %d, so the task would be stopped before it could say what it waits for; expected more than pipeline.waitSeconds, %d" $name (int $seconds) (int $pipeline.waitSeconds) -}}
{{- end -}}
{{- end -}}
{{- $pinned := and (hasKey $pipeline.cpu.nodeSelector "kubernetes.io/hostname") (hasKey $pipeline.gpu.nodeSelector "kubernetes.io/hostname") -}}
{{- if and (include "clincot.cacheClaim" .) (ne $pipeline.cache.accessMode "ReadWriteMany") (not $pinned) (gt (int $pipeline.parallelShards) 1) -}}
{{- printf "\n- pipeline.parallelShards is %d, but only one node can mount the cache with access mode %s; expected ReadWriteMany, at most 1, or node selectors of one host (kubernetes.io/hostname)" (int $pipeline.parallelShards) $pipeline.cache.accessMode -}}
{{- end -}}
{{- $judges := list -}}
{{- range .Values.judges -}}
{{- if has .name $judges -}}{{- printf "\n- judges: the name %s is there twice" .name -}}{{- end -}}
{{- $judges = append $judges .name -}}
{{- end -}}
{{- end }}
