#!/usr/bin/env bash
# One round on rendered radiographs with the shipped small models, and a look at its first pair.
#
#   examples/01_round.sh [options of `clincot rounds`, for instance --set train.margin_lambda=0]
#
# RUN, DATA and BENCHMARK name the folders. Data sets that do not exist are rendered (a CT is downloaded once, 35 MB).
# Started again, it resumes where it stopped. About ten minutes on two CPU cores; less with IMAGES=40.
set -euo pipefail

RUN=${RUN:-runs/example-round}
DATA=${DATA:-$RUN-data/train}
BENCHMARK=${BENCHMARK:-$RUN-data/test}
IMAGES=${IMAGES:-200}

# The patients (warps) of the two sets differ: a patient in both would be a leak.
[ -d "$DATA" ] || clincot render --out "$DATA" --warps 0:24 --images "$IMAGES"
[ -d "$BENCHMARK" ] || clincot render --out "$BENCHMARK" --warps 100:124 --images "$IMAGES"

# All rendered radiographs show one anatomy and look alike, so near-duplicates are allowed here. Leave this out for real data.
clincot rounds --recipe small-model --run "$RUN" --data "$DATA" --benchmark "$BENCHMARK" --policy shipped:policy \
  --count 1 --set decide.max_near_duplicates=1 "$@"

# Everything that the first preference pair was made from: images, regions, judges, policy.
pair=$(head -n 1 "$RUN/round-01/pairs.jsonl" | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
clincot show "$pair" --run "$RUN" --picture "$RUN/pair.png"
cat "$RUN/round-01/decision.md"
