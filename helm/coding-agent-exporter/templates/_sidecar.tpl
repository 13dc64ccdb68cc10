{{/*
For charts that have this one as a dependency. Each takes the context of that chart (`.`), or this chart's own context
where the dependency has an alias: (index .Subcharts "alias").

  metadata:
    labels: {{- include "coding-agent-exporter.sidecar.labels" . | nindent 8 }}
    annotations: {{- include "coding-agent-exporter.sidecar.annotations" . | nindent 8 }}
  spec:
    initContainers: {{- include "coding-agent-exporter.sidecar.initContainers" . | nindent 8 }}
    containers: {{- include "coding-agent-exporter.sidecar.containers" . | nindent 8 }}
    volumes: {{- include "coding-agent-exporter.sidecar.volumes" . | nindent 8 }}
*/}}

{{- define "coding-agent-exporter.sidecar.known" -}}
{{- if not (and .Values.mode .Values.scrape .Values.state) -}}
{{- fail "coding-agent-exporter.sidecar.* were given the context of a chart that does not itself depend on coding-agent-exporter by this name: give (index .Subcharts \"<its alias>\")." -}}
{{- end -}}
{{- end }}

{{/* What PodMonitor selects. */}}
{{- define "coding-agent-exporter.sidecar.labels" -}}
{{- $own := index (.Subcharts | default dict) "coding-agent-exporter" | default . -}}
{{- include "coding-agent-exporter.sidecar.known" $own -}}
{{- include "coding-agent-exporter.podSelector" $own }}
{{- with $own.Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.sidecar.annotations" -}}
{{- $own := index (.Subcharts | default dict) "coding-agent-exporter" | default . -}}
{{- include "coding-agent-exporter.sidecar.known" $own -}}
{{- include "coding-agent-exporter.podAnnotations" $own | trim }}
{{- end }}

{{/* Whether this Kubernetes knows init containers that stay: started before the agent, ended after it. */}}
{{- define "coding-agent-exporter.sidecar.native" -}}
{{- if semverCompare ">=1.29.0-0" .Capabilities.KubeVersion.Version }}true{{ end }}
{{- end }}

{{/* The container as a native sidecar. First in the list, so that it is there before other init containers work. */}}
{{- define "coding-agent-exporter.sidecar.initContainers" -}}
{{- if include "coding-agent-exporter.sidecar.native" . }}
{{- include "coding-agent-exporter.sidecar.container" . }}
{{- end }}
{{- end }}

{{/* The container where there are no native sidecars. */}}
{{- define "coding-agent-exporter.sidecar.containers" -}}
{{- if not (include "coding-agent-exporter.sidecar.native" .) }}
{{- include "coding-agent-exporter.sidecar.container" . }}
{{- end }}
{{- end }}

{{/* The container as an item of a list, whichever list it is for. */}}
{{- define "coding-agent-exporter.sidecar.container" -}}
{{- $own := index (.Subcharts | default dict) "coding-agent-exporter" | default . -}}
{{- include "coding-agent-exporter.sidecar.known" $own -}}
{{- if ne $own.Values.mode "sidecar" }}
{{- fail (printf "coding-agent-exporter.sidecar.* are for mode sidecar, and mode is %s." $own.Values.mode) }}
{{- end }}
{{- include "coding-agent-exporter.validate" $own }}
{{- include "coding-agent-exporter.validateInputs" $own }}
{{- $native := include "coding-agent-exporter.sidecar.native" . | eq "true" -}}
- {{ include "coding-agent-exporter.container" (dict "root" $own "native" $native) | indent 2 | trim }}
{{- end }}

{{- define "coding-agent-exporter.sidecar.volumes" -}}
{{- $own := index (.Subcharts | default dict) "coding-agent-exporter" | default . -}}
{{- include "coding-agent-exporter.sidecar.known" $own -}}
{{- include "coding-agent-exporter.volumes" $own }}
{{- end }}

{{/* What the pod needs so that the exporter can linger. */}}
{{- define "coding-agent-exporter.sidecar.terminationGracePeriodSeconds" -}}
{{- $own := index (.Subcharts | default dict) "coding-agent-exporter" | default . -}}
{{- include "coding-agent-exporter.sidecar.known" $own -}}
{{- int64 $own.Values.terminationGracePeriodSeconds }}
{{- end }}
