{{/* Fails, with a sentence, for values that cannot work. Gives nothing. */}}
{{- define "coding-agent-exporter.validate" -}}
{{- $v := .Values -}}
{{- $sidecar := eq $v.mode "sidecar" -}}
{{- $linger := include "coding-agent-exporter.linger" . | include "coding-agent-exporter.seconds" | float64 -}}
{{- $interval := include "coding-agent-exporter.seconds" $v.scrape.interval | float64 -}}
{{- $monitored := or $v.podMonitor.enabled $v.serviceMonitor.enabled -}}
{{- $flushText := dig "otlp" "flush-timeout" "5s" $v.settings -}}
{{- $flush := not (empty $v.otlp.endpoint) | ternary (include "coding-agent-exporter.seconds" $flushText | float64) 0.0 -}}
{{- if ge (addf $linger $flush) (float64 $v.terminationGracePeriodSeconds) -}}
{{- $also := not (empty $v.otlp.endpoint) | ternary (printf " and settings.otlp.flush-timeout (%s) together" $flushText) "" -}}
{{- fail (printf "shutdown.linger (%s)%s must be shorter than terminationGracePeriodSeconds (%d): the exporter would be killed before its end." (include "coding-agent-exporter.linger" .) $also (int $v.terminationGracePeriodSeconds)) -}}
{{- end -}}
{{- $holdText := dig "counters" "zero-hold" "0" $v.settings -}}
{{- $hold := include "coding-agent-exporter.seconds" $holdText | float64 -}}
{{- if and $sidecar $monitored (gt $linger 0.0) -}}
{{- if le $linger (mulf 2 $interval) -}}
{{- fail (printf "shutdown.linger (%s) must be more than twice scrape.interval (%s): a new series needs two scrapes, its zero and its value." (include "coding-agent-exporter.linger" .) $v.scrape.interval) -}}
{{- end -}}
{{- /* A hold that is longer than the linger ends with it, and one scrape shows the zero. */ -}}
{{- if and (lt $hold $linger) (le $linger (addf $hold (mulf 2 $interval))) -}}
{{- fail (printf "shutdown.linger (%s) must be more than settings.counters.zero-hold (%s) and twice scrape.interval (%s) together: a new series would still be held at zero in its last scrape." (include "coding-agent-exporter.linger" .) $holdText $v.scrape.interval) -}}
{{- end -}}
{{- end -}}
{{- if gt (include "coding-agent-exporter.seconds" $v.scrape.timeout | float64) $interval -}}
{{- fail (printf "scrape.timeout (%s) must not be longer than scrape.interval (%s)." $v.scrape.timeout $v.scrape.interval) -}}
{{- end -}}
{{- if hasPrefix "/-/" $v.web.telemetryPath -}}
{{- fail (printf "web.telemetryPath (%s) must not be below /-/, where health and readiness are." $v.web.telemetryPath) -}}
{{- end -}}
{{- $flags := dict -}}
{{- range include "coding-agent-exporter.args" . | fromYamlArray -}}
{{- $flag := regexFind "^--[^=]+" . | replace "--no-" "--" -}}
{{- if and (hasKey $flags $flag) (not (has $flag (list "--telemetry.dir" "--usage.root" "--sessions.dir"))) -}}
{{- fail (printf "extraArgs: %s has a value of its own, and the exporter would end with \"given twice\"." $flag) -}}
{{- end -}}
{{- $_ := set $flags $flag true -}}
{{- end -}}
{{- if and $v.podMonitor.enabled $v.serviceMonitor.enabled -}}
{{- fail "podMonitor.enabled and serviceMonitor.enabled exclude each other: every pod would be scraped twice, and all spend counted twice." -}}
{{- end -}}
{{- if and $sidecar $v.serviceMonitor.enabled -}}
{{- fail "serviceMonitor.enabled needs a Service, and mode sidecar has none: use podMonitor.enabled." -}}
{{- end -}}
{{- if and $sidecar $v.service.enabled -}}
{{- fail "service.enabled needs pods of this chart, and mode sidecar has none." -}}
{{- end -}}
{{- if gt (int $v.replicas) 1 -}}
{{- fail "replicas must be 1 (or 0): two exporters cannot share a state, and would count everything twice." -}}
{{- end -}}
{{- $surge := dig "rollingUpdate" "maxSurge" 0 ($v.updateStrategy | default dict) | toString -}}
{{- if and (eq $v.mode "daemonset") (not (has $surge (list "0" "0%"))) -}}
{{- fail (printf "updateStrategy.rollingUpdate.maxSurge (%s) must be 0: the new exporter could not have the state while the old one does." $surge) -}}
{{- end -}}
{{- if and (include "coding-agent-exporter.hasService" .) (not (regexMatch "^[a-z]" (include "coding-agent-exporter.fullname" .))) -}}
{{- fail (printf "a Service cannot be named %s, as that does not begin with a letter: set fullnameOverride." (include "coding-agent-exporter.fullname" .)) -}}
{{- end -}}
{{- $taken := include "coding-agent-exporter.ownLabels" . | fromYaml -}}
{{- range $where, $labels := dict "commonLabels" $v.commonLabels "scrape.labels" $v.scrape.labels "prometheusRule.labels" $v.prometheusRule.labels "dashboards.labels" $v.dashboards.labels -}}
{{- range $key, $_ := $labels -}}
{{- if hasKey $taken $key -}}
{{- fail (printf "%s cannot have %s, which the chart sets itself." $where $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := include "coding-agent-exporter.podSelector" . | fromYaml -}}
{{- if hasKey ($v.podLabels | default dict) $key -}}
{{- fail (printf "podLabels cannot have %s, by which the pods are selected." $key) -}}
{{- end -}}
{{- end -}}
{{- if hasKey ($v.prometheusRule.alertLabels | default dict) "severity" -}}
{{- fail "prometheusRule.alertLabels cannot have severity, which each alert has its own: see prometheusRule.alerts." -}}
{{- end -}}
{{- if and $v.podDisruptionBudget.enabled (ne $v.mode "deployment") -}}
{{- fail (printf "podDisruptionBudget.enabled is for mode deployment: in mode %s draining a node ends its agents too." $v.mode) -}}
{{- end -}}
{{- if and (eq (include "coding-agent-exporter.stateType" .) "persistentVolumeClaim") (ne $v.mode "deployment") -}}
{{- fail (printf "state.type persistentVolumeClaim is for mode deployment: in mode %s several exporters would share one state." $v.mode) -}}
{{- end -}}
{{- if and (eq (include "coding-agent-exporter.stateType" .) "hostPath") (ne $v.mode "daemonset") -}}
{{- fail (printf "state.type hostPath is for mode daemonset: in mode %s the next pod may run on another node, or beside this one." $v.mode) -}}
{{- end -}}
{{- if and (dig "runAsNonRoot" false ($v.securityContext | default dict)) (eq (dig "runAsUser" 1 $v.securityContext | int) 0) -}}
{{- fail "securityContext.runAsUser is 0 and securityContext.runAsNonRoot is true: Kubernetes would not start the container." -}}
{{- end -}}
{{- if and $v.web.tls.enabled (not $v.web.existingSecret) (not $v.web.tls.secretName) -}}
{{- fail "web.tls.enabled needs web.tls.secretName: a Secret with tls.crt and tls.key." -}}
{{- end -}}
{{- if and $v.web.tls.verifyClients (not $v.web.tls.enabled) -}}
{{- fail "web.tls.verifyClients needs web.tls.enabled." -}}
{{- end -}}
{{- if and $v.web.basicAuth.enabled (not $v.web.existingSecret) (not $v.web.basicAuth.users) -}}
{{- fail "web.basicAuth.enabled needs web.basicAuth.users: names to bcrypt hashes." -}}
{{- end -}}
{{- if and $v.web.existingSecret (or $v.web.basicAuth.users $v.web.tls.verifyClients) -}}
{{- fail "web.existingSecret holds the whole web configuration: web.basicAuth.users and web.tls.verifyClients would not be in it." -}}
{{- end -}}
{{- if and $monitored $v.web.basicAuth.enabled (not $v.scrape.basicAuth.secretName) -}}
{{- fail "web.basicAuth.enabled needs scrape.basicAuth.secretName: Prometheus has to know a password." -}}
{{- end -}}
{{- if and $monitored $v.web.tls.enabled (not $v.scrape.tlsConfig) -}}
{{- fail "web.tls.enabled needs scrape.tlsConfig: Prometheus has to know how to verify the exporter, as {serverName: ..., ca: ...} or {insecureSkipVerify: true}." -}}
{{- end -}}
{{- if not $v.otlp.endpoint -}}
{{- range $name := list "headers" "existingSecret" "protocol" "clusterName" "resourceAttributes" -}}
{{- if get $v.otlp $name -}}
{{- fail (printf "otlp.%s needs otlp.endpoint: without one nothing is sent." $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.otlp.headers $v.otlp.existingSecret -}}
{{- fail "otlp.headers and otlp.existingSecret exclude each other: put all headers into the Secret." -}}
{{- end -}}
{{- if ne $v.mode "sidecar" -}}
{{- include "coding-agent-exporter.validateInputs" . -}}
{{- end -}}
{{- end }}

{{/* Where there is a container it has to have something to read. */}}
{{- define "coding-agent-exporter.validateInputs" -}}
{{- $mode := .Values.mode -}}
{{- if not .Values.inputs -}}
{{- fail (printf "inputs must name at least one directory of agents in mode %s." $mode) -}}
{{- end -}}
{{- $names := dict -}}
{{- $hostPaths := 0 -}}
{{- range .Values.inputs -}}
{{- if hasKey $names .name -}}
{{- fail (printf "inputs: the name %q is given twice." .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- if .hostPath -}}
{{- $hostPaths = add1 $hostPaths -}}
{{- if ne $mode "daemonset" -}}
{{- fail (printf "inputs: %s has a hostPath, which is for mode daemonset: in mode %s the node is not chosen by its files." .name $mode) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq $mode "daemonset") (not $hostPaths) -}}
{{- fail "mode daemonset needs an input with a hostPath: what does not differ by node is for mode deployment." -}}
{{- end -}}
{{- if ne $mode "sidecar" -}}
{{- $volumes := list -}}
{{- range .Values.extraVolumes -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- range .Values.inputs -}}
{{- if and .volume (not (has .volume $volumes)) -}}
{{- fail (printf "inputs: %s is on the volume %s, which is not one of extraVolumes." .name .volume) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
