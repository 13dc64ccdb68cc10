{{/*
Gives the groups of a PrometheusRule, from the files that Prometheus loads as they are. An alert is switched, renamed in
severity, and its thresholds are replaced: the number before the comment `# <name>` at the end of a line.
*/}}
{{- define "coding-agent-exporter.groups" -}}
{{- $values := .Values.prometheusRule -}}
{{- $changes := $values.alerts | default dict -}}
{{- $known := list -}}
{{- $groups := list -}}
{{- range $path, $_ := .Files.Glob "files/rules/*.yaml" -}}
{{- $file := $.Files.Get $path | fromYaml -}}
{{- range $group := $file.groups -}}
{{- $rules := list -}}
{{- range $rule := $group.rules -}}
{{- if $rule.alert -}}
{{- $known = append $known $rule.alert -}}
{{- $change := get $changes $rule.alert | default dict -}}
{{- if hasKey $change "enabled" | ternary $change.enabled true -}}
{{- $expr := $rule.expr -}}
{{- range $name, $number := $change.thresholds -}}
{{- $pattern := printf "-?[0-9][0-9.eE+-]*([\\s)]*# %s[ \\t]*(\\n|$))" (regexQuoteMeta $name) -}}
{{- if not (regexMatch $pattern $expr) -}}
{{- $names := list -}}
{{- range regexFindAll "# \\w+[ \\t]*(\\n|$)" $expr -1 -}}
{{- $names = append $names (trimPrefix "# " . | trim) -}}
{{- end -}}
{{- fail (printf "prometheusRule.alerts.%s.thresholds: there is no threshold %q; there is %s." $rule.alert $name (join ", " $names | default "none")) -}}
{{- end -}}
{{- $expr = regexReplaceAll $pattern $expr (printf "%v${1}" $number) -}}
{{- end -}}
{{- $_ := set $rule "expr" $expr -}}
{{- if hasKey $change "for" -}}
{{- $_ := set $rule "for" $change.for -}}
{{- end -}}
{{- $labels := merge (dict) $rule.labels ($values.alertLabels | default dict) -}}
{{- with $change.severity -}}
{{- $_ := set $labels "severity" . -}}
{{- end -}}
{{- $_ := set $rule "labels" $labels -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- else if eq $rule.record "period:coding_agent_budget_usd:limit" -}}
{{- $budget := get ($values.budgets | default dict) $rule.labels.period -}}
{{- if not (kindIs "invalid" $budget) -}}
{{- if not (kindIs "string" $budget) -}}
{{- $_ := set $rule "expr" (printf "vector(%v)" $budget) -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- end -}}
{{- if $rules -}}
{{- $_ := set $group "rules" $rules -}}
{{- $groups = append $groups $group -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := $changes -}}
{{- if not (has $name $known) -}}
{{- fail (printf "prometheusRule.alerts: there is no alert %q; there are %s." $name (join ", " $known)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end }}
