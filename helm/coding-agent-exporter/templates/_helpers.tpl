{{/* Names and labels. */}}

{{/* What a label can hold, and may end with. */}}
{{- define "coding-agent-exporter.cut" -}}
{{- regexReplaceAll "[-.]+$" (trunc 63 .) "" }}
{{- end }}

{{- define "coding-agent-exporter.name" -}}
{{- default .Chart.Name .Values.nameOverride | include "coding-agent-exporter.cut" }}
{{- end }}

{{/* Releases may have dots in their names, Services not. 63 are room for every release, so that no two become one. */}}
{{- define "coding-agent-exporter.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $full .Values.fullnameOverride | replace "." "-" | include "coding-agent-exporter.cut" }}
{{- end }}

{{- define "coding-agent-exporter.selectorLabels" -}}
app.kubernetes.io/name: {{ include "coding-agent-exporter.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "coding-agent-exporter.ownLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | include "coding-agent-exporter.cut" | quote }}
{{ include "coding-agent-exporter.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{/*
Takes the chart's context, or {root: that, more: labels of one object}. One map, as the same label may be asked for in
more than one place, and a key that stands twice is an error to some who read YAML.
*/}}
{{- define "coding-agent-exporter.labels" -}}
{{- $root := .root | default . -}}
{{- merge (include "coding-agent-exporter.ownLabels" $root | fromYaml) (.more | default dict) ($root.Values.commonLabels | default dict) | toYaml }}
{{- end }}

{{/*
What PodMonitor and NetworkPolicy go by: in pods of other charts, this one's labels would be a lie. Not the release,
which may have this chart twice: each PodMonitor would scrape the pods of both.
*/}}
{{- define "coding-agent-exporter.podSelector" -}}
{{- if eq .Values.mode "sidecar" -}}
coding-agent-exporter: {{ include "coding-agent-exporter.fullname" . | quote }}
{{- else -}}
{{ include "coding-agent-exporter.selectorLabels" . }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "coding-agent-exporter.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.stateType" -}}
{{- $of := dict "sidecar" "emptyDir" "daemonset" "hostPath" "deployment" "persistentVolumeClaim" -}}
{{- default (get $of .Values.mode) .Values.state.type -}}
{{- end }}

{{- define "coding-agent-exporter.linger" -}}
{{- default (eq .Values.mode "sidecar" | ternary "40s" "0") .Values.shutdown.linger -}}
{{- end }}

{{/* Seconds of a duration such as 1m30s, as a decimal number. */}}
{{- define "coding-agent-exporter.seconds" -}}
{{- $seconds := 0.0 -}}
{{- $of := dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 "w" 604800.0 -}}
{{- range regexFindAll "[0-9.]+(ms|s|m|h|d|w)" . -1 -}}
{{- $seconds = addf $seconds (mulf (regexFind "[0-9.]+" . | float64) (get $of (regexFind "[a-z]+" .))) -}}
{{- end -}}
{{- $seconds -}}
{{- end }}

{{/* Whether there is a Service. ServiceMonitor finds its targets by it. */}}
{{- define "coding-agent-exporter.hasService" -}}
{{- if and (ne .Values.mode "sidecar") (or .Values.service.enabled .Values.serviceMonitor.enabled) }}true{{ end }}
{{- end }}

{{/* Name of the Secret with web.yml; empty: no web configuration. */}}
{{- define "coding-agent-exporter.webSecret" -}}
{{- if .Values.web.existingSecret -}}
{{ .Values.web.existingSecret }}
{{- else if or .Values.web.tls.enabled .Values.web.basicAuth.enabled -}}
{{ include "coding-agent-exporter.fullname" . }}-web
{{- end }}
{{- end }}

{{/* Name of the Secret with the headers of OTLP; empty: no headers. */}}
{{- define "coding-agent-exporter.otlpSecret" -}}
{{- if .Values.otlp.existingSecret -}}
{{ .Values.otlp.existingSecret }}
{{- else if .Values.otlp.headers -}}
{{ include "coding-agent-exporter.fullname" . }}-otlp
{{- end }}
{{- end }}

{{/* name=value,... of a map, percent-encoded: the format of OTEL_EXPORTER_OTLP_HEADERS. */}}
{{- define "coding-agent-exporter.pairs" -}}
{{- $pairs := list -}}
{{- range $name, $value := . -}}
{{- $pairs = append $pairs (printf "%s=%s" (urlquery $name) (toString $value | urlquery | replace "+" "%20")) -}}
{{- end -}}
{{- join "," $pairs -}}
{{- end }}
