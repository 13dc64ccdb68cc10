{{/* Names and labels. */}}

{{- define "coding-agent-exporter.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "coding-agent-exporter.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.selectorLabels" -}}
app.kubernetes.io/name: {{ include "coding-agent-exporter.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "coding-agent-exporter.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "coding-agent-exporter.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What PodMonitor and NetworkPolicy go by: in pods of other charts, this one's labels would be a lie. */}}
{{- define "coding-agent-exporter.podSelector" -}}
{{- if eq .Values.mode "sidecar" -}}
coding-agent-exporter: {{ .Release.Name }}
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
