"""Every command with its arguments before the command line moved to typer.

None of them may disappear. "<x>" is a required positional argument, "[x]" an optional one, "--x=" an option with a
value; "!" marks required options.
"""

from __future__ import annotations

SPELLINGS: dict[str, str] = {
    "preflight": "--service= --launch= --report=! --table=! --champion=! --base= --params= --set=",
    "prepare": "--data=! --questions=! --params= --set=",
    "propose": "--data=! --questions=! --policy=! --regions=! --params= --set=",
    "answer": (
        "--data=! --questions=! --regions=! --policy=! --candidates-before= --scores-before= --candidates=! "
        "--params= --set="
    ),
    "judge": (
        "--data=! --questions=! --regions=! --candidates=! --steps= --judgements=! --scores=! "
        "--panel-report=! --params= --set="
    ),
    "pair": "--candidates=! --scores=! --pairs=! --pair-report=! --params= --set=",
    "version": (
        "--questions=! --regions=! --candidates=! --judgements=! --scores=! --panel-report=! --pairs=! "
        "--pair-report=! --steps= --version=! --repository= --round= --params= --set="
    ),
    "train": (
        "--data=! --questions=! --regions=! --candidates=! --pairs=! --policy=! --steps= --version= --launch= "
        "--checkpoint=! --params= --set="
    ),
    "evaluate": "--benchmark=! --policy=! --train-reports= --outcomes=! --report=! --params= --set=",
    "decide": (
        "--benchmark=! --champion=! --challenger=! --blind= --base= --data= --calibration= --panel-report= "
        "--panel-report-before= --pair-report= --ledger= --decision=! --evidence=! --summary=! --exit-code "
        "--explain --params= --set="
    ),
    "publish": (
        "--checkpoint=! --report= --decision= --panel-report= --golden= --published=! --store= --name= "
        "--adapter= --params= --set="
    ),
    "rounds": (
        "--run=! --data=! --benchmark=! --policy=! --count= --from= --compare= --blind-from= --calibrated-on= "
        "--no-page --params= --set="
    ),
    "ingest": "",
    "ingest vqa-rad": "<source> --out=! --split= --test-share= --seed= --workers= --allow-refused=",
    "ingest slake": (
        "<source> --out=! --split= --test-share= --seed= --workers= --allow-refused= --language= --box-format="
    ),
    "ingest iu-xray": ("<source> --out=! --split= --test-share= --seed= --workers= --allow-refused= --placeholders="),
    "ingest dicom": (
        "<source> --out=! --split= --test-share= --seed= --workers= --allow-refused= --questions= --salt-file="
    ),
    "ingest jsonl": "<source> --out=! --split= --test-share= --seed= --workers= --allow-refused=",
    "render": "--out=! --warps=! --images=! --questions= --seed= --split= --composition=",
    "report-questions": "<source> --out=! --question= --workers= --allow-refused=",
    "report-metrics": (
        "--references=! --hypotheses=! --train= --studies= --clinical= --label= --out= --resamples= --seed="
    ),
    "data": "",
    "data init": "<repository> --remote=! --endpoint=",
    "data log": "--repository= --json --params= --set=",
    "data diff": "<a> <b> --repository= --json --params= --set=",
    "small-models": "--out=! --work=! --only=",
    "sft": "<role> --data=! --policy=! --out=! --region-truth= --part= --params= --set=",
    "calibrate": "--data=! --out=! --limit= --params= --set=",
    "convert": "",
    "convert llava-med": "<source> <out> --vision-tower=",
    "convert huatuogpt-vision": "<source> <out> --vision-tower=",
    "doctor": "<checkpoint> --as= --gpu-memory= --no-generate --params= --set=",
    "show": "<id> --run= --picture=",
    "page": "--run=",
    "power": "<decision> --questions= --gain= --power=",
    "blind": "--data= --train= --test=",
    "serve": (
        "--checkpoint=! --host= --port= --http_port= --model-name= --model_name= --api-keys= --abstain-below= "
        "--predictor_host= --predictor-host= --predictor-path= --predictor-model= --predictor-key-env= --set="
    ),
    "models": "",
    "models list": "--store= --name= --by= --params= --set=",
    "models show": "<checkpoint> --store= --name= --by= --params= --set= --card",
    "models start": "<checkpoint> --store= --name= --by= --params= --set=",
    "models rollback": "--store= --name= --by= --params= --set= --to= --reason=!",
    "models prune": "--store= --name= --by= --params= --set= --keep= --unfinished --really --yes",
    "deploy": (
        "--store= --name= --by= --params= --set= --checkpoint= --approval --show-manifests --storage-secret= "
        "--base= --golden= --ask --abandon= --stop --target= --service= --crd= --context= --state= --port= "
        "--serve-command="
    ),
    "approve": (
        "<decision> --store= --name= --by= --params= --set= --reason=! --target= --service= --crd= --context= "
        "--state= --port= --serve-command="
    ),
    "store": "",
    "store create": "<url> --wait= --pod=",
    "store watch": "<url> --name= --host= --port=",
    "pipeline": "",
    "pipeline compile": (
        "--out=! --cluster= --service= --launch= --data= --benchmark= --blind-from= --shards= --rounds= "
        "--no-deploy --params= --set="
    ),
    "pipeline run-local": (
        "--run=! --policy= --cluster= --service= --launch= --data= --benchmark= --blind-from= --shards= "
        "--rounds= --no-deploy --params= --set="
    ),
    "pipeline submit": (
        "--run-name= --wait= --cluster= --service= --launch= --data= --benchmark= --blind-from= --shards= "
        "--rounds= --no-deploy --params= --set= --endpoint= --token-file= --ca-cert= --ui= --namespace= "
        "--pipeline= --experiment="
    ),
    "pipeline schedule": (
        "--cron= --interval= --remove --cluster= --service= --launch= --data= --benchmark= --blind-from= "
        "--shards= --rounds= --no-deploy --params= --set= --endpoint= --token-file= --ca-cert= --ui= "
        "--namespace= --pipeline= --experiment="
    ),
    "pipeline status": ("[run_id] --endpoint= --token-file= --ca-cert= --ui= --namespace= --pipeline= --experiment="),
    "pipeline upload": (
        "--cluster= --service= --launch= --data= --benchmark= --blind-from= --shards= --rounds= --no-deploy "
        "--params= --set= --endpoint= --token-file= --ca-cert= --ui= --namespace= --pipeline= --experiment="
    ),
    "pipeline put": "<folder> <url>",
}
