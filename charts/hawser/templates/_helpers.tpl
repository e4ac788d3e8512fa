{{/* First part of all names. Not the release's: a second driver of one name cannot be. */}}
{{- define "hawser.fullname" -}}
{{- default "hawser" .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "hawser.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that never change, for selectors: (list . "component") */}}
{{- define "hawser.selector" -}}
{{- $top := first . -}}
app.kubernetes.io/name: {{ include "hawser.name" $top }}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{/* Labels of an object: (list . "component") */}}
{{- define "hawser.labels" -}}
{{- $top := first . -}}
{{ include "hawser.selector" . }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image: (dict "image" VALUES "default" TAG) */}}
{{- define "hawser.image" -}}
{{- with .image.registry }}{{ . }}/{{ end }}{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .default .image.tag }}{{ end }}
{{- end -}}

{{- define "hawser.ourImage" -}}
{{- include "hawser.image" (dict "image" .Values.image "default" .Chart.AppVersion) -}}
{{- end -}}

{{/* What every role is told about its log. */}}
{{- define "hawser.logArgs" -}}
- --log={{ .Values.log.level }}
- --log-format={{ .Values.log.format }}
{{- end -}}

{{/* Where a role tells metrics: (list . PORT) */}}
{{- define "hawser.metricsArgs" -}}
{{- $values := (first .).Values.metrics -}}
{{- if $values.enabled -}}
- --metrics=:{{ last . }}
{{- with $values.from }}
- --metrics-from={{ join "," . }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* A container that may do nothing to its node. */}}
{{- define "hawser.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The user of our image, which is nobody on the node. */}}
{{- define "hawser.unprivileged" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Probes: (dict "host" ADDRESS "port" PORT); the host may be left out. */}}
{{- define "hawser.probes" -}}
startupProbe:
  {{- include "hawser.probe" (dict "at" . "path" "/healthz") | nindent 2 }}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  {{- include "hawser.probe" (dict "at" . "path" "/healthz") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{- include "hawser.probe" (dict "at" . "path" "/readyz") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}

{{- define "hawser.probe" -}}
httpGet:
  {{- with .at.host }}
  host: {{ . }}
  {{- end }}
  path: {{ .path }}
  port: {{ .at.port }}
{{- end -}}

{{/* A sidecar of the controller: (list . "name" ARGS) */}}
{{- define "hawser.sidecar" -}}
{{- $top := index . 0 -}}
{{- $name := index . 1 -}}
{{- $values := index $top.Values.sidecars $name -}}
- name: csi-{{ $name }}
  image: {{ include "hawser.image" (dict "image" $values.image "default" "") }}
  imagePullPolicy: IfNotPresent
  args:
    - --csi-address=/csi/csi.sock
    - --leader-election
    - --leader-election-namespace=$(NAMESPACE)
    - --v={{ $values.logLevel }}
    {{- range index . 2 }}
    - {{ . }}
    {{- end }}
    {{- with $values.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  env:
    - name: NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
  securityContext:
    {{- include "hawser.confined" $top | nindent 4 }}
  resources:
    {{- toYaml $values.resources | nindent 4 }}
  volumeMounts:
    - name: csi
      mountPath: /csi
{{- end -}}

{{/* Where our own pools and those made by hand are, each once, in order. */}}
{{- define "hawser.directories" -}}
{{- $all := list -}}
{{- range .Values.pools }}{{ $all = append $all .directory }}{{ end -}}
{{- concat $all .Values.agent.directories | uniq | sortAlpha | toJson -}}
{{- end -}}

{{/* Node selectors that agents follow, each once. */}}
{{- define "hawser.nodeSelectors" -}}
{{- $all := list -}}
{{- range .Values.pools }}{{ $all = append $all (default dict .nodeSelector) }}{{ end -}}
{{- concat $all .Values.agent.nodeSelectors | uniq | toJson -}}
{{- end -}}

{{/* What the controller labels the volumes' servers with. It does not know of nameOverride. */}}
{{- define "hawser.serverSelector" -}}
app.kubernetes.io/name: hawser
app.kubernetes.io/component: server
{{- end -}}

{{/* How to roll out, which is said only where something rolls. */}}
{{- define "hawser.strategy" -}}
{{- eq .type "RollingUpdate" | ternary . (omit . "rollingUpdate") | toYaml -}}
{{- end -}}

{{- /* Selects what tells metrics, pods and their Services alike. */}}
{{- define "hawser.measured" -}}
matchLabels:
  app.kubernetes.io/name: {{ include "hawser.name" . }}
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [controller, node, agent]
{{- end }}

{{- /* How a monitor scrapes, from its values. */}}
{{- define "hawser.scrape" -}}
- port: metrics
  path: /metrics
  interval: {{ .interval }}
  scrapeTimeout: {{ .scrapeTimeout }}
  # Of a node part the node is of more use than the address.
  relabelings:
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: instance
    {{- with .relabelings }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .metricRelabelings }}
  metricRelabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
