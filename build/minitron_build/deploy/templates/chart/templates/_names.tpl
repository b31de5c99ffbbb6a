{{- define "minitron.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "minitron.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "minitron.labels" -}}
{{ include "minitron.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{- define "minitron.claim" -}}
{{ .Values.model.existingClaim | default (printf "%s-bundle" (include "minitron.fullname" .)) }}
{{- end }}

{{- /* Seconds that a start may take: a base, and the engine read at the assumed rate, rounded up. */}}
{{- define "minitron.startSeconds" -}}
{{- $start := .Values.probes.startup }}
{{- $rate := int64 $start.readBytesPerSecond }}
{{- add (int64 $start.baseSeconds) (div (sub (add (int64 .Values.engine.bytes) $rate) 1) $rate) }}
{{- end }}

{{- /* One tritonserver per rank under mpirun: the first loads every model and listens, the others the engine. */}}
{{- define "minitron.args" -}}
{{- $world := int .Values.engine.worldSize }}
{{- if gt $world 1 }}
- mpirun
- --allow-run-as-root
- --bind-to
- none
- --map-by
- slot:OVERSUBSCRIBE
- --mca
- odls_base_sigkill_timeout
- {{ .Values.drainSeconds | int64 | quote }}
{{- end }}
{{- range $rank := until $world }}
{{- if gt $rank 0 }}
- ":"
{{- end }}
{{- if gt $world 1 }}
- -n
- "1"
{{- end }}
- /opt/tritonserver/bin/tritonserver
- --model-repository=/bundle/model_repo
- --disable-auto-complete-config
- --backend-config=python,shm-region-prefix-name=prefix{{ $rank }}_
- --grpc-port=8001
- --http-port=8000
- --metrics-port=8002
- --metrics-address=0.0.0.0
- --exit-timeout-secs={{ $.Values.drainSeconds | int64 }}
{{- if not $.Values.service.http }}
- --http-address=127.0.0.1
{{- end }}
- --grpc-restricted-protocol=model-repository,trace,logging,shared-memory:minitron-admin-key=$(MINITRON_ADMIN_KEY)
- --http-restricted-api=model-repository,trace,logging,shared-memory:minitron-admin-key=$(MINITRON_ADMIN_KEY)
{{- if $.Values.auth.apiKeySecret }}
- --grpc-restricted-protocol=inference,model-config,statistics:minitron-key=$(MINITRON_API_KEY)
- --http-restricted-api=inference,model-config,statistics:minitron-key=$(MINITRON_API_KEY)
{{- end }}
{{- if $.Values.tls.secretName }}
- --grpc-use-ssl=1
- --grpc-server-cert=/tls/tls.crt
- --grpc-server-key=/tls/tls.key
{{- if $.Values.tls.mutual }}
- --grpc-use-ssl-mutual=1
- --grpc-root-cert=/tls/ca.crt
{{- end }}
{{- end }}
- --model-control-mode=explicit
- --load-model={{ if gt $rank 0 }}tensorrt_llm{{ else }}*{{ end }}
{{- range $.Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "minitron.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end }}

{{- define "minitron.bundleMount" -}}
- name: bundle
  mountPath: /bundle
  readOnly: true
  {{- with .Values.model.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end }}
