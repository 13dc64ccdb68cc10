{{/* Volumes of the container, in a pod of any chart. */}}
{{- define "coding-agent-exporter.volumes" -}}
{{- $state := include "coding-agent-exporter.stateType" . -}}
- name: coding-agent-exporter-state
  {{- if eq $state "emptyDir" }}
  emptyDir:
    {{- toYaml (.Values.state.emptyDir | default dict) | nindent 4 }}
  {{- else if eq $state "hostPath" }}
  hostPath:
    path: {{ .Values.state.hostPath.path | quote }}
    type: DirectoryOrCreate
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ .Values.state.persistentVolumeClaim.existingClaim | default (printf "%s-state" (include "coding-agent-exporter.fullname" .)) | quote }}
  {{- end }}
{{- range .Values.inputs }}
{{- if .hostPath }}
- name: agents-{{ .name }}
  hostPath:
    path: {{ .hostPath | quote }}
    type: {{ hasKey . "hostPathType" | ternary .hostPathType "Directory" | quote }}
{{- else if .existingClaim }}
- name: agents-{{ .name }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim | quote }}
    # Not only in the mount: the kubelet would give the agents' files to fsGroup.
    readOnly: true
{{- end }}
{{- end }}
{{- with include "coding-agent-exporter.webSecret" . }}
- name: coding-agent-exporter-web
  secret:
    secretName: {{ . | quote }}
{{- end }}
{{- if and .Values.web.tls.enabled .Values.web.tls.secretName }}
- name: coding-agent-exporter-tls
  secret:
    secretName: {{ .Values.web.tls.secretName | quote }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Variables of a Secret are read when the container starts: another Secret, another pod. */}}
{{- define "coding-agent-exporter.podAnnotations" -}}
{{- with .Values.otlp.headers }}
checksum/otlp: {{ toJson . | sha256sum }}
{{- end }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Pod template of DaemonSet and Deployment. */}}
{{- define "coding-agent-exporter.pod" -}}
metadata:
  labels:
    {{- include "coding-agent-exporter.selectorLabels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with include "coding-agent-exporter.podAnnotations" . | trim }}
  annotations:
    {{- . | nindent 4 }}
  {{- end }}
spec:
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  serviceAccountName: {{ include "coding-agent-exporter.serviceAccountName" . | quote }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.podSecurityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int64 .Values.terminationGracePeriodSeconds }}
  {{- $context := .Values.securityContext | default dict }}
  {{- $uid := int ($context.runAsUser | default 0) }}
  {{- if and (eq (include "coding-agent-exporter.stateType" .) "hostPath") .Values.state.hostPath.chown $uid }}
  initContainers:
    # The kubelet makes the directory for root, and fsGroup does not reach a hostPath.
    - name: own-state
      image: {{ include "coding-agent-exporter.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command:
        - python3
        - -c
        - |
          import os, sys
          directory, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
          # Root without capabilities cannot list what is another's, of mode 0700.
          os.chown(directory, os.getuid(), -1)
          for path in [*(entry.path for entry in os.scandir(directory)), directory]:
              os.chown(path, uid, gid, follow_symlinks=False)
        - /var/lib/coding-agent-exporter
        - {{ $uid | quote }}
        - {{ int ($context.runAsGroup | default $uid) | quote }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        runAsUser: 0
        runAsNonRoot: false
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          add: [CHOWN]
        seccompProfile:
          type: RuntimeDefault
      volumeMounts:
        - name: coding-agent-exporter-state
          mountPath: /var/lib/coding-agent-exporter
  {{- end }}
  containers:
    - {{ include "coding-agent-exporter.container" (dict "root" . "native" false) | indent 6 | trim }}
  volumes:
    {{- include "coding-agent-exporter.volumes" . | nindent 4 }}
  {{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with get $.Values $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end }}
