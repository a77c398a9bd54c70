#!/bin/sh
# Write the secrets that docker-compose.yml asks for: random, one file each, never overwritten.
#
#     sh docker/make-secrets.sh [FOLDER]        default: docker/secrets
#
# The folder is closed to other users of this machine. The files themselves must be readable: Compose mounts them with the owner and mode
# they have here, and each container reads them as a user of its own.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 0700 "$folder"
for name in postgres_password dagster_db_password mlflow_db_password storage_key storage_secret grafana_password; do
    file="$folder/$name"
    if [ -e "$file" ]; then
        echo "kept    $file"
        continue
    fi
    (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$file.new")
    chmod 0444 "$file.new"
    mv "$file.new" "$file"
    echo "written $file"
done
