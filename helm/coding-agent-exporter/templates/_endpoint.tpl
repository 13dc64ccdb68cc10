{{/* What an endpoint of a PodMonitor and one of a ServiceMonitor have in common. */}}
{{- define "coding-agent-exporter.endpoint" -}}
port: agent-metrics
path: {{ .Values.web.telemetryPath | quote }}
interval: {{ .Values.scrape.interval }}
scrapeTimeout: {{ .Values.scrape.timeout }}
{{- if .Values.web.tls.enabled }}
scheme: https
tlsConfig:
  {{- toYaml .Values.scrape.tlsConfig | nindent 2 }}
{{- end }}
{{- if .Values.web.basicAuth.enabled }}
basicAuth:
  {{- range $part := list "username" "password" }}
  {{ $part }}:
    name: {{ $.Values.scrape.basicAuth.secretName | quote }}
    key: {{ get $.Values.scrape.basicAuth (printf "%sKey" $part) | quote }}
  {{- end }}
{{- end }}
{{- if or (eq .Values.mode "daemonset") .Values.scrape.relabelings }}
relabelings:
  {{- if eq .Values.mode "daemonset" }}
  - sourceLabels: [__meta_kubernetes_pod_node_name]
    targetLabel: node
  {{- end }}
  {{- with .Values.scrape.relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with .Values.scrape.metricRelabelings }}
metricRelabelings:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
