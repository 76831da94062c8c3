#!/usr/bin/env bash
# Install MegaContext here and write .mc_env: settings of W&B, Hugging Face and OpenTelemetry that every job reads.
#   cluster/setup.sh                     asks for what the environment does not give
#   cluster/setup.sh --yes               asks nothing; takes the environment and leaves the rest empty
# Options: --yes, --no-install, --file FILE (default .mc_env beside the Makefile). Secrets are read from the
# environment or typed without echo, never from the command line, where other users could see them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
file=$root/.mc_env
ask=1
install=1

usage() { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case $1 in
        --yes) ask=0 ;;
        --no-install) install=0 ;;
        --file) file=${2:?--file needs a path}; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# name, secret or plain, question
settings=(
    "NANOCHAT_BASE_DIR|plain|folder for data, tokenizer and runs (empty: ~/.cache/nanochat)"
    "WANDB_API_KEY|secret|Weights & Biases API key (empty: no uploads)"
    "WANDB_PROJECT|plain|Weights & Biases project (empty: megacontext)"
    "MEGACONTEXT_ENABLE_WANDB|plain|1 to refuse to run without uploads (empty: no)"
    "HF_TOKEN|secret|Hugging Face token (empty: public files only)"
    "MC_OTEL_ENDPOINT|plain|OTLP collector, host:port (empty: no telemetry)"
    "MC_OTEL_INSECURE|plain|1 when the collector has no TLS (empty: TLS)"
    "OTEL_EXPORTER_OTLP_PROTOCOL|plain|what the collector speaks, http/protobuf or grpc (empty: http/protobuf)"
    "OTEL_EXPORTER_OTLP_HEADERS|secret|name=value headers that the collector wants (empty: none)"
)

if [ "$install" = 1 ]; then
    make -C "$root" install
fi

umask 077
temporary=$(mktemp "$file.XXXXXX")
trap 'rm -f "$temporary"' EXIT
echo "# Settings that every job reads; written by cluster/setup.sh. Keep it private." >"$temporary"
count=0
for setting in "${settings[@]}"; do
    IFS='|' read -r name kind question <<<"$setting"
    value=${!name:-}
    if [ -z "$value" ] && [ "$ask" = 1 ]; then
        if [ "$kind" = secret ]; then
            read -r -s -p "$name: $question: " value || value=
            echo
        else
            read -r -p "$name: $question: " value || value=
        fi
    fi
    if [ -n "$value" ]; then
        # Single quotes keep every character; a quote itself is closed, escaped and opened again.
        printf "%s='%s'\n" "$name" "${value//\'/\'\\\'\'}" >>"$temporary"
        count=$((count + 1))
    fi
done
chmod 600 "$temporary"
if [ -f "$file" ]; then
    mv "$file" "$file.before"
    echo "the file that was there is now $file.before"
fi
mv "$temporary" "$file"
trap - EXIT
echo "wrote $file ($count settings, readable by you alone)"
