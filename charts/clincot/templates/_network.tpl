{{/* Egress rules that follow from addresses. Kubernetes reads an empty or missing list of peers or ports as "all", so
these templates give no rule at all where a list is empty. */}}

{{/* The peers that an address names: the namespace of a Service, or an IP. Empty if it is a name outside the cluster,
which a network policy cannot express. JSON. */}}
{{- define "clincot.peersOf" -}}
{{- $host := regexReplaceAll ":[0-9]+$" (urlParse .).host "" -}}
{{- $ip := trimSuffix "]" (trimPrefix "[" $host) -}}
{{- $peers := list -}}
{{- if regexMatch "^[^.]+\\.[^.]+\\.svc($|\\.)" $host -}}
{{- $peers = list (dict "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" (index (splitList "." $host) 1)))) -}}
{{- else if regexMatch "^\\d+(\\.\\d+){3}$" $ip -}}
{{- $peers = list (dict "ipBlock" (dict "cidr" (printf "%s/32" $ip))) -}}
{{- else if hasPrefix "[" $host -}}
{{- $peers = list (dict "ipBlock" (dict "cidr" (printf "%s/128" $ip))) -}}
{{- end -}}
{{- toJson $peers -}}
{{- end }}

{{/* The rule to an address. {url; peers: "auto", or a list that replaces those of the address; port: 0 for that of the
address}. A JSON list of one rule, or of none if `peers` is an empty list. */}}
{{- define "clincot.egressTo" -}}
{{- $port := int (default (include "clincot.portOf" .url) .port) -}}
{{- $rule := dict "ports" (list (dict "protocol" "TCP" "port" $port)) -}}
{{- $peers := ternary (include "clincot.peersOf" .url | fromJsonArray) .peers (eq (toString .peers) "auto") -}}
{{- if $peers -}}
{{- $rule = set $rule "to" $peers -}}
{{- end -}}
{{- toJson (ternary (list $rule) list (or (not (empty $peers)) (eq (toString .peers) "auto"))) -}}
{{- end }}

{{/* The rules to several addresses. A JSON list. */}}
{{- define "clincot.egressToAll" -}}
{{- $rules := list -}}
{{- range uniq . -}}
{{- $rules = concat $rules (include "clincot.egressTo" (dict "url" . "peers" "auto" "port" 0) | fromJsonArray) -}}
{{- end -}}
{{- toJson (uniq $rules) -}}
{{- end }}

{{/* Every URL under one of the names in a map or list, at any depth. {in, names}. A JSON list. */}}
{{- define "clincot.urlsIn" -}}
{{- $names := .names -}}
{{- $found := list -}}
{{- if kindIs "map" .in -}}
{{- range $key, $value := .in -}}
{{- if and (has $key $names) (kindIs "string" $value) (regexMatch "^https?://" (toString $value)) -}}
{{- $found = append $found $value -}}
{{- end -}}
{{- $found = concat $found (include "clincot.urlsIn" (dict "in" $value "names" $names) | fromJsonArray) -}}
{{- end -}}
{{- else if kindIs "slice" .in -}}
{{- range .in -}}
{{- $found = concat $found (include "clincot.urlsIn" (dict "in" . "names" $names) | fromJsonArray) -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* Addresses that a request to a served policy may need: an HTTP grounder, an image, the collector of traces. JSON. */}}
{{- define "clincot.servingAddresses" -}}
{{- $params := include "clincot.params" . | fromYaml -}}
{{- $found := include "clincot.urlsIn" (dict "in" (pick $params "serve" "evaluate" "publish") "names" (list "http_url")) | fromJsonArray -}}
{{- $found = concat $found (include "clincot.urlsIn" (dict "in" .Values.server.settings "names" (list "http_url" "traces_endpoint")) | fromJsonArray) -}}
{{- range (default list .Values.server.settings.url_hosts) -}}
{{- $found = append $found (printf "https://%s" .) -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* Addresses of model registries, which whoever publishes or rolls out a checkpoint tells. JSON. */}}
{{- define "clincot.registryAddresses" -}}
{{- $params := include "clincot.params" . | fromYaml -}}
{{- include "clincot.urlsIn" (dict "in" (pick $params "publish" "deploy") "names" (list "model_registry")) -}}
{{- end }}

{{/* Addresses that a run needs: judges, the policy's endpoint (models.url), HTTP grounders, model registries, the
endpoint's own address, URLs in pipeline.env. JSON. */}}
{{- define "clincot.runAddresses" -}}
{{- $params := include "clincot.params" . | fromYaml -}}
{{- $found := include "clincot.urlsIn" (dict "in" $params "names" (list "http_url")) | fromJsonArray -}}
{{- $found = concat $found (compact (list (default dict $params.models).url)) -}}
{{- $found = concat $found (include "clincot.registryAddresses" . | fromJsonArray) -}}
{{- $found = concat $found (include "clincot.servingAddresses" . | fromJsonArray) -}}
{{- $judges := (default dict $params.judge).judges -}}
{{- $own := list -}}
{{- range .Values.judges -}}
{{- if .modelUri -}}{{- $own = append $own (include "clincot.judgeName" (dict "root" $ "judge" .)) -}}{{- end -}}
{{- end -}}
{{- range $judges -}}
{{- if and .url (not (has .model $own)) -}}{{- $found = append $found .url -}}{{- end -}}
{{- end -}}
{{- range $name, $value := .Values.pipeline.env -}}
{{- /* only scheme, host and port: the rest may be anything, and what is no address opens nothing */ -}}
{{- $address := regexReplaceAll "^(https?://)[^/@?#]*@" $value "${1}" -}}
{{- with regexFind "^https?://([A-Za-z0-9.-]+|\\[[0-9a-fA-F:]+\\])(:[0-9]{1,5})?" $address -}}
{{- $found = append $found . -}}
{{- end -}}
{{- end -}}
{{- if and .Values.pipeline.deploys .Values.server.endpointUrl -}}
{{- $found = append $found .Values.server.endpointUrl -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* A git address in the form of a URL: USER@HOST:PATH is SSH. */}}
{{- define "clincot.gitUrl" -}}
{{- if contains "://" . -}}
{{- . -}}
{{- else -}}
{{- printf "ssh://%s" (first (splitList ":" .)) -}}
{{- end -}}
{{- end }}
