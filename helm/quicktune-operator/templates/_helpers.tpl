{{/* One name for everything of a release; Jobs and Leases carry it, so it stays short. */}}
{{- define "quicktune.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "quicktune" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-quicktune" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of a part: (list $ "quicktune-redis"). */}}
{{- define "quicktune.labels" -}}
{{- $ := index . 0 -}}
{{ include "quicktune.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
app.kubernetes.io/part-of: quicktune
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name ($.Chart.Version | replace "+" "_") }}
{{- end -}}

{{- define "quicktune.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end -}}

{{/* repository@digest, or repository:tag: (list $ .Values.image). */}}
{{- define "quicktune.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default (index . 0).Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "quicktune.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "quicktune.fullname" .) -}}
{{- end -}}

{{- define "quicktune.redisSecret" -}}
{{- .Values.redis.existingSecret.name | default (printf "%s-redis" (include "quicktune.fullname" .)) -}}
{{- end -}}

{{/* "true" where a password is mounted: always with the bundled Redis. */}}
{{- define "quicktune.hasPassword" -}}
{{- if or .Values.redis.bundled.enabled .Values.redis.existingSecret.name -}}true{{- end -}}
{{- end -}}

{{- define "quicktune.redisURL" -}}
{{- if .Values.redis.bundled.enabled -}}
redis://quicktune@{{ include "quicktune.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{- $folder := "/etc/quicktune/redis-tls" -}}
{{- .Values.redis.external.url -}}
{{- with .Values.redis.external.tls -}}
{{- if .secretName -}}?ssl_ca_certs={{ $folder }}/ca.crt
{{- if .clientCertificate -}}&ssl_certfile={{ $folder }}/tls.crt&ssl_keyfile={{ $folder }}/tls.key{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the Pod Security Standard `restricted` asks of every container. */}}
{{- define "quicktune.containerSecurity" -}}
{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
{{- end -}}

{{/* What the operator calls in a namespace of runs; tests compare it with the code and the audit log. */}}
{{- define "quicktune.rules" -}}
- {apiGroups: [quicktune.dev], resources: [tuningruns], verbs: [get, list, watch, patch, delete]}
- {apiGroups: [quicktune.dev], resources: [tuningruns/status], verbs: [patch]}
- {apiGroups: [batch], resources: [jobs], verbs: [get, list, watch, create, patch, delete]}
- {apiGroups: [""], resources: [pods], verbs: [list, watch, create]}     # create: for the dry run only
- {apiGroups: [""], resources: [persistentvolumeclaims], verbs: [get, list, create, patch, delete]}
- {apiGroups: [""], resources: [configmaps], verbs: [get]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
{{- if not .Values.watchNamespaces }}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [get, create]}     # of steps; elsewhere the chart makes it
{{- end }}
{{- end -}}

{{/* Ports of a hub of weights, as the operator counts them: 443, and the endpoint's own. */}}
{{- define "quicktune.hubPorts" -}}
{{- $url := urlParse .Values.trainer.weights.endpoint -}}
{{- $named := $url.host | regexFind ":[0-9]+$" | trimPrefix ":" -}}
{{- $port := $named | default (ternary "80" "443" (eq $url.scheme "http")) | atoi -}}
{{- toJson (list 443 $port | uniq) -}}
{{- end -}}

{{/* What values.schema.json cannot say. */}}
{{- define "quicktune.validate" -}}
{{- if and .Values.redis.bundled.enabled .Values.redis.external.url -}}
{{- fail "redis.external.url is set: set redis.bundled.enabled=false with it" -}}
{{- end -}}
{{- if not (or .Values.redis.bundled.enabled .Values.redis.external.url) -}}
{{- fail "no Redis: set redis.bundled.enabled=true or redis.external.url" -}}
{{- end -}}
{{- if and .Values.redis.external.tls.secretName (not (hasPrefix "rediss://" .Values.redis.external.url)) -}}
{{- fail "redis.external.tls.secretName needs a redis.external.url that begins with rediss://" -}}
{{- end -}}
{{- if and .Values.redis.external.tls.clientCertificate (not .Values.redis.external.tls.secretName) -}}
{{- fail "redis.external.tls.clientCertificate needs redis.external.tls.secretName" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: name one in serviceAccount.name" -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled -}}
{{- fail "metrics.serviceMonitor and metrics.podMonitor would scrape every pod twice: enable one" -}}
{{- end -}}
{{- end -}}
