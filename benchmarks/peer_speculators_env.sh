#!/bin/sh
# The speculators library in a virtual environment of its own, for peer_speculators.py:  sh benchmarks/peer_speculators_env.sh FOLDER
# It asks for torchvision and torchaudio, which text alone does not need and whose wheels go with one build of torch: hence --no-deps.
set -eu
folder=${1:?say which folder to make the environment in}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet torch==2.13.0 "numpy<2.5" safetensors "transformers<=5.19.0" "datasets<=5.1.0" "openai>=2" \
    pydantic pydantic-settings "loguru<=0.7.3" rich typer "tqdm<=4.70.1" psutil protobuf aiohttp httpx click
"$folder/bin/python" -m pip install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
"$folder/bin/python" -c "import speculators.train.trainer"
