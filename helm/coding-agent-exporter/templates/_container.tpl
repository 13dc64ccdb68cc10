{{/* Takes {root: the chart's context, native: whether it is a native sidecar}, gives the container. */}}
{{- define "coding-agent-exporter.container" -}}
{{- $v := .root.Values -}}
{{- $sidecar := eq $v.mode "sidecar" -}}
name: coding-agent-exporter
image: {{ include "coding-agent-exporter.image" .root }}
imagePullPolicy: {{ $v.image.pullPolicy }}
{{- if .native }}
restartPolicy: Always
{{- end }}
args:
  {{- include "coding-agent-exporter.args" .root | nindent 2 }}
env:
  {{- include "coding-agent-exporter.env" .root | nindent 2 }}
{{- with $v.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  # Not "metrics": names of ports are unique in a pod, and the agent may have one.
  - name: agent-metrics
    containerPort: {{ $v.web.port }}
    protocol: TCP
{{- range $name, $path := dict "startupProbe" "/-/healthy" "livenessProbe" "/-/healthy" "readinessProbe" "/-/ready" }}
{{- $probe := get $v $name }}
{{- if and $probe (get ($probe | default dict) "enabled") (not (and $sidecar (eq $name "readinessProbe"))) }}
{{ $name }}:
  {{- if or $v.web.basicAuth.enabled $v.web.tls.verifyClients (and $v.web.existingSecret $v.web.tls.enabled) }}
  # The kubelet has neither password nor certificate, and the exporter asks for them on every path.
  tcpSocket:
    port: agent-metrics
  {{- else }}
  httpGet:
    path: {{ $path }}
    port: agent-metrics
    {{- if $v.web.tls.enabled }}
    scheme: HTTPS
    {{- end }}
  {{- end }}
  {{- with omit $probe "enabled" }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}
resources:
  {{- toYaml ($v.resources | default dict) | nindent 2 }}
securityContext:
  {{- toYaml ($v.securityContext | default dict) | nindent 2 }}
volumeMounts:
  - name: coding-agent-exporter-state
    mountPath: /var/lib/coding-agent-exporter
  {{- range $v.inputs }}
  - name: {{ .volume | default (printf "agents-%s" .name) }}
    mountPath: /agents/{{ .name }}
    {{- with .subPath }}
    subPath: {{ . | quote }}
    {{- end }}
    readOnly: true
  {{- end }}
  {{- if include "coding-agent-exporter.webSecret" .root }}
  - name: coding-agent-exporter-web
    mountPath: /etc/coding-agent-exporter/web
    readOnly: true
  {{- end }}
  {{- if and $v.web.tls.enabled $v.web.tls.secretName }}
  - name: coding-agent-exporter-tls
    mountPath: /etc/coding-agent-exporter/tls
    readOnly: true
  {{- end }}
  {{- with $v.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "coding-agent-exporter.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ printf "%s@%s" .repository .digest | quote }}
{{- else -}}
{{ printf "%s:%s" .repository (default $.Chart.AppVersion .tag) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.args" -}}
- {{ printf "--web.listen-address=:%d" (int .Values.web.port) }}
- {{ printf "--web.telemetry-path=%s" .Values.web.telemetryPath | quote }}
{{- if include "coding-agent-exporter.webSecret" . }}
- --web.config.file=/etc/coding-agent-exporter/web/web.yml
{{- end }}
{{- range $input := .Values.inputs }}
{{- range $kind, $flag := dict "telemetry" "telemetry.dir" "usage" "usage.root" "sessions" "sessions.dir" }}
{{- with get $input $kind }}
- {{ printf "--%s=%s=%s" $flag $input.name (clean (printf "/agents/%s/%s" $input.name .)) | quote }}
{{- end }}
{{- end }}
{{- end }}
- --state.path=/var/lib/coding-agent-exporter/state.db
- --shutdown.linger={{ include "coding-agent-exporter.linger" . }}
{{- with .Values.otlp.endpoint }}
- {{ printf "--otlp.endpoint=%s" . | quote }}
{{- end }}
{{- with .Values.otlp.protocol }}
- --otlp.protocol={{ . }}
{{- end }}
{{- range $group, $settings := .Values.settings }}
{{- range $name, $value := $settings }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s.%s" ($value | ternary "" "no-") $group $name | quote }}
{{- else }}
{{- /* Numbers of values are floats, which Go writes as 1e+06. */}}
- {{ printf "--%s.%s=%v" $group $name (kindIs "float64" $value | ternary (toString (int64 $value)) $value) | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "coding-agent-exporter.env" -}}
- name: K8S_CONTAINER_NAME
  value: coding-agent-exporter
{{- range $name, $path := dict "K8S_NAMESPACE_NAME" "metadata.namespace" "K8S_NODE_NAME" "spec.nodeName" "K8S_POD_NAME" "metadata.name" "K8S_POD_UID" "metadata.uid" }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
{{- if eq .Values.mode "sidecar" }}
# Empty where the pod is no Job's.
- name: K8S_JOB_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['batch.kubernetes.io/job-name']
{{- else }}
- name: {{ eq .Values.mode "daemonset" | ternary "K8S_DAEMONSET_NAME" "K8S_DEPLOYMENT_NAME" }}
  value: {{ include "coding-agent-exporter.fullname" . | quote }}
{{- end }}
{{- with .Values.otlp.clusterName }}
- name: K8S_CLUSTER_NAME
  value: {{ . | quote }}
{{- end }}
{{- with .Values.otlp.resourceAttributes }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: {{ include "coding-agent-exporter.pairs" . | quote }}
{{- end }}
{{- with include "coding-agent-exporter.otlpSecret" . }}
- name: CODING_AGENT_EXPORTER_OTLP_HEADERS
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: headers
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
