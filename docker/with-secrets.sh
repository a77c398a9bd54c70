#!/bin/sh
# Run a command with secrets from files: for each NAME below, NAME_FILE names the file that holds it. Prints none of them.
set -eu
for name in PGPASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
    eval "file=\${${name}_FILE:-}"
    [ -n "$file" ] || continue
    if [ ! -r "$file" ] || [ ! -s "$file" ]; then
        echo "${name}_FILE names $file, which is empty or can't be read: sh docker/make-secrets.sh writes it" >&2
        exit 2
    fi
    value=$(cat "$file")
    export "$name=$value"
done
exec "$@"
