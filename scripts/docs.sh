#!/usr/bin/env bash
# Build the site of the docs into DIR (site/ where none is named); a warning is an error, and nothing is fetched.
#   bash scripts/docs.sh             then open site/index.html
#   bash scripts/docs.sh DIR
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
out=$(realpath -m "${1:-$here/../site}")
. "$here/install.sh" "${DOCS_EXTRAS:-docs}"

NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet --site-dir "$out"
echo "$out/index.html"
