#!/usr/bin/env bash
# locks.sh: writes locks/*.txt, the pins of requirements-*.txt with the hashes of their files on PyPI. Needs uv.
#
# requirements-vllm.txt and requirements-families.txt have no lock with hashes: their torch and torchvision may come from an
# index with builds for CPUs, whose files are others.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in checkov clients cuda; do
  {
    echo "# Written by make locks from requirements-$name.txt; installed with --require-hashes and without dependencies."
    "${UV:-uv}" pip compile "requirements-$name.txt" --no-deps --generate-hashes --no-annotate --no-header --quiet \
      --python-version 3.11.9 --python-platform x86_64-manylinux_2_36
  } > "locks/$name.txt"
done
