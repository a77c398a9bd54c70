#!/bin/sh
# A database and a role that owns it for each of our two users, on the first start of PostgreSQL. Neither may read the other's.
set -eu
for name in dagster mlflow; do
    # psql's own quoting (:'password', :"name"): nothing of a secret is ever part of a command line
    PASSWORD_FILE="/run/secrets/${name}_db_password" psql --username "$POSTGRES_USER" --dbname postgres --no-psqlrc --quiet \
        --set ON_ERROR_STOP=1 --set name="$name" <<'SQL'
\set password `cat "$PASSWORD_FILE"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
done
