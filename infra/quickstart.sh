#!/usr/bin/env bash
# Installs if need be, draws pictures, labels them with this project's own checkpoint on a Ray of this machine, and shows
# what came out. Everything is made below .venv and quickstart; a second run finds nothing new to label.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash infra/install.sh
SECONDS=0
python=.venv/bin/python
unset RAY_ADDRESS

if [[ ! -d quickstart/images ]]; then
    echo "quickstart: drawing 600 pictures, about 2 % of them broken in one way or another"
    rm -rf quickstart/unfinished
    $python jobs/draw_images.py --output quickstart/unfinished --num-images 600 --seed 22 --broken-fraction 0.02
    mv quickstart/unfinished quickstart/images
fi

echo "quickstart: labeling quickstart/images (Ray takes about ten seconds to start)"
# One copy of the model is enough for so little, and on two cores ready 12 s sooner than one per core.
$python jobs/label_bucket.py --input quickstart/images --output quickstart/labels --model demo --gpu-actors 1

# show TITLE SQL: the command, and what it prints.
show() {
    local command="$python -c \"import duckdb; duckdb.sql(\\\"$2\\\").show(max_width=140)\""
    printf '\n%s\n$ %s\n' "$1" "$command"
    bash -c "$command"
}
labels="'quickstart/labels/labels/**/*.parquet'"
failures="'quickstart/labels/failures/**/*.parquet'"
drawn="split_part(uri, '/', -2)"

show "What was drawn, and the first of the five labels of each picture:" \
    "SELECT $drawn AS drawn, label_names[1] AS label, round(label_scores[1], 3) AS score, split_part(uri, '/', -1) AS file FROM $labels ORDER BY md5(uri) LIMIT 8"
show "How many labels are what was drawn:" \
    "SELECT count(*) AS labeled, round(avg(CAST(label_names[1] = $drawn AS INT)), 4) AS top_1 FROM $labels"
show "What has no label, and why:" \
    "SELECT split_part(uri, '/', -1) AS file, failure_kind, left(failure_message, 70) AS message FROM $failures ORDER BY failure_kind"

cat <<END

The table is below quickstart/labels/labels, embeddings included; the run's report, for a browser: quickstart/labels/_runs/*/report.html
A published checkpoint on your own photos (downloads 90 MB from the Hugging Face hub):
$ $python jobs/label_bucket.py --input FOLDER --output my-labels --model facebook/deit-small-distilled-patch16-224
quickstart: done in $SECONDS s after installation
END
